"""Names that other programs have for keys of the configuration; a message about an unknown key names Tritrain's."""

_NAMES = {
    "run.name": "run_name experiment_name exp_name",
    "run.folder": "output_dir out_dir save_dir log_dir",
    "run.seed": "random_seed",
    "model.num_layers": "num_hidden_layers n_layer n_layers num_blocks depth",
    "model.hidden_size": "n_embd d_model dim embed_dim hidden_dim",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size n_inner mlp_hidden_size",
    "model.num_heads": "num_attention_heads n_head n_heads",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups n_query_groups",
    "model.max_sequence_length": "max_position_embeddings context_length n_positions n_ctx",
    "model.activation": "hidden_act activation_function",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.tie_embeddings": "tie_word_embeddings weight_tying untie_embeddings_and_output_weights",
    "model.init_std": "initializer_range init_scale init_method_std",
    "model.embedding_init_std": "embedding_init_method_std",
    "model.vocab_size": "padded_vocab_size vocabulary_size",
    "model.head_dim": "head_size kv_channels",
    "model.norm": "normalization norm_type norm_class_name",
    "model.qkv_bias": "attention_bias attn_bias add_qkv_bias",
    "model.rope_theta": "rope_base rotary_base",
    "data.sources": "dataset datasets dataset_path data_path train_data train_files train_path data_dir",
    "data.sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size",
    "data.workers": "num_workers dataloader_num_workers",
    "data.validation_rows": "eval_iters val_batches limit_val_batches",
    "data.prepare.tokenizer": "tokenizer tokenizer_path tokenizer_name tokenizer_file",
    "training.global_batch_sequences": "batch_size global_batch_size train_batch_size grad_accum grad_accumulation "
    "grad_accumulation_steps gradient_accumulation gradient_accumulation_steps accumulate_grad_batches",
    "training.micro_batch_sequences": "micro_batch_size micro_batch device_batch_size per_device_train_batch_size "
    "train_micro_batch_size_per_gpu local_batch_size",
    "training.batch_warmup": "rampup_batch_size batch_size_warmup batch_size_schedule batch_size_scheduler",
    "training.sequence_warmup": "seqlen_warmup sequence_length_warmup sequence_length_schedule curriculum",
    "training.total_steps": "max_steps num_steps train_steps training_steps num_train_steps max_iters num_iterations "
    "train_iters num_iters iterations",
    "training.total_tokens": "max_tokens num_tokens train_tokens epochs num_epochs num_train_epochs max_epochs",
    "training.compute_dtype": "dtype torch_dtype bf16 fp16 amp mixed_precision param_dtype precision "
    "mixed_precision_param",
    "training.activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute",
    "training.compile": "torch_compile",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon adam_eps",
    "optimizer.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    "schedule.shape": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "schedule.warmup_steps": "warmup warmup_iters warmup_ratio num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "schedule.final_fraction": "min_lr min_lr_ratio final_lr eta_min min_lr_factor",
    "schedule.decay_fraction": "decay_ratio decay_steps wsd_decay_steps",
    "schedule.horizon_steps": "lr_decay_iters lr_decay_steps",
    "averaging.half_life_tokens": "ema_decay ema ema_half_life use_ema ema_beta swa",
    "engine.name": "strategy backend fsdp",
    "engine.zero_stage": "zero stage",
    "engine.deepspeed": "zero_optimization deepspeed_config ds_config",
    "engine.offload": "cpu_offload offload_optimizer offload_params",
    "checkpoint.interval_steps": "save_steps save_interval save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n keep_latest_k",
    "checkpoint.start_from": "init_from pretrained load_checkpoint resume_from_checkpoint resume_from",
    "checkpoint.asynchronous": "async_save async_mode",
    "logging.interval_steps": "logging_steps log_interval log_every log_every_n_steps",
    "logging.tensorboard": "enable_tensorboard use_tensorboard",
    "logging.trackers": "wandb report_to use_wandb wandb_log enable_wandb trackio mlflow use_mlflow",
    "logging.project": "wandb_project experiment_name",
    "evaluation.sample_prompts": "sample_prompt prompts prompt eval_prompts",
    "evaluation.interval_steps": "eval_steps eval_interval eval_every val_check_interval",
}

_NAMES_IN_SECTION = {
    "run.folder": "dir path output",
    "model.num_layers": "layers",
    "model.num_heads": "heads",
    "model.max_sequence_length": "max_seq_len max_seq_length seq_len seq_length block_size context n_ctx",
    "data.sources": "path paths name",
    "schedule.shape": "type name decay_type",
    "averaging.half_life_tokens": "decay beta half_life half_life_steps tokens momentum",
    "engine.name": "type",
    "checkpoint.interval_steps": "every interval steps frequency",
    "logging.interval_steps": "every interval steps frequency log_freq",
    "evaluation.interval_steps": "every interval steps frequency",
    "watch.step_seconds": "timeout timeout_seconds",
    "model.rope_scaling.method": "rope_type type name",
    "model.rope_scaling.original_max_sequence_length": "original_max_position_embeddings original_context_length",
    "phases.N.steps": "length num_steps max_steps duration total_steps",
    "phases.N.tokens": "num_tokens max_tokens total_tokens",
    "phases.N.precision": "bits name type",
    "phases.N.sources": "data dataset datasets data_path train_data mixture data_mixture paths path",
    "phases.N.learning_rate": "lr max_lr peak_lr base_lr",
    "phases.N.sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size",
    "phases.N.quantization": "quant method preset recipe",
    "phases.N.transition": "ramp optimizer",
    "phases.N.transition.calibration": "gptq ptq calibrate",
    "phases.N.transition.calibration.sequences": "samples num_samples nsamples",
    "phases.N.transition.ramp": "ramp_steps warmup warmup_steps",
    "phases.N.transition.ramp.shape": "type name",
    "phases.N.transition.ramp.steps": "length num_steps duration",
    "phases.N.quantization.preset": "name type method scheme recipe",
    "phases.N.quantization.levels": "bits weight_bits num_bits",
    "phases.N.quantization.activations": "act_bits activation_bits",
    "phases.N.distillation.weight": "alpha kd_weight",
    "phases.N.distillation.teacher": "teacher_model model",
}
"""Names that say what they mean only within their section."""

_SECTIONS = {
    "training": "train trainer",
    "optimizer": "optim",
    "schedule": "lr_scheduler scheduler lr_schedule",
    "averaging": "ema average averages model_averaging",
    "engine": "parallelism distributed fsdp deepspeed",
    "checkpoint": "ckpt checkpointing",
    "logging": "log logger metrics tracking",
    "evaluation": "eval validation",
}


def _by_alias(names: dict[str, str]) -> dict[str, str]:
    return {alias: key for key, aliases in names.items() for alias in aliases.split()}


ALIASES = _by_alias(_NAMES)
"""The key for each name, in lower case."""

ALIASES_IN_SECTION = {
    (key.rpartition(".")[0], alias): key for key, names in _NAMES_IN_SECTION.items() for alias in names.split()
}
"""The key for a section, as `phases.N.transition`, and a name in it."""

SECTION_ALIASES = _by_alias(_SECTIONS)
"""The section for each name of one."""
