"""The simulator's exceptions."""


class SimulationError(Exception):
    """A bug in a kernel, with the kernel, PTX line, source line, tensor, CTA and thread."""


class Unsupported(SimulationError):
    """An instruction, or a variant of one, that the simulator does not implement."""
