"""The cost of Muon: FLOPs, bytes that ranks exchange, and the second moments that it does without."""

from math import prod

from launcher.plan.course import Course
from model.size import is_matrix, parameter_shapes


def orthogonalize_flops(shape: tuple[int, ...], num_steps: int) -> int:
    """FLOPs of ``num_steps`` of the Newton-Schulz iteration: two products with a matrix, one with its Gram matrix."""
    short, long = sorted(shape)
    return num_steps * 2 * (2 * short**2 * long + short**3)


def matrix_shapes(course: Course) -> dict[str, tuple[int, ...]]:
    """Shapes, by name, of the matrices that Muon updates in any phase."""
    shapes = parameter_shapes(course.config.model) if course.has_muon else {}
    return {name: shape for name, shape in shapes.items() if is_matrix(name, len(shape))}


def muon_flops(course: Course) -> int:
    """FLOPs of an update of all matrices, which ranks share; 0 without Muon."""
    muon = course.config.optimizer.muon_or_default
    return sum(orthogonalize_flops(shape, muon.newton_schulz_steps) for shape in matrix_shapes(course).values())


def spared_elements(course: Course) -> int:
    """Elements that never have a second moment: those of all matrices, if every phase has Muon."""
    if any(phase.optimizer != "muon" for phase in course.phases):
        return 0
    return sum(map(prod, matrix_shapes(course).values()))
