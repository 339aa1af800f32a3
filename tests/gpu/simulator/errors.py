"""The one exception: what the simulator found wrong, or what it cannot execute."""


class SimulationError(Exception):
    """A finding. Its text names kernel, PTX line, source line, tensor, CTA and thread."""


class Unsupported(SimulationError):
    """An instruction, or a variant of one, that the simulator does not know."""
