"""The parts of the training loop: the step, the switch, guards, telemetry, evaluation."""
