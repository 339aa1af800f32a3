"""Commands run in this process, on models so small that each takes a moment."""

from pathlib import Path

import torch
from tiny import WORDS, tiny_bert, tiny_tokenizer
from transformers import BertModel
from typer.testing import CliRunner

from kroneckerbert.cli.app import app
from kroneckerbert.cli.sources import read_model


def run(*arguments, app=app) -> tuple[int, str]:
    """Exit code and output; an error that is not ours is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def succeeds(*arguments) -> str:
    code, output = run(*arguments)
    assert code == 0, output
    return output


def fails(*arguments, app=app) -> str:
    """The error, of one line; a training may have shown its progress beside it."""
    code, output = run(*arguments, app=app)
    assert code in (1, 2), output
    lines = [line for line in output.splitlines() if "Error" in line or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), output
    assert "This is a bug" not in lines[0]
    return lines[0]


def save(folder: Path, cls=BertModel, with_tokenizer: bool = True, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 5 + len(WORDS), "initializer_range": 0.3}
    tiny_bert(cls, **sizes | overrides).save_pretrained(folder)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def student_of(teacher: Path) -> Path:
    out = teacher.with_name(f"{teacher.name}-student")
    succeeds("compress", teacher, out)
    return out


def time_briefly(monkeypatch) -> None:
    """Let plans and reports time each layer only a few times: tests expect no particular time."""
    for name in ("plan.clock.LAYER_SECONDS", "plan.planner.MODULE_SECONDS"):
        monkeypatch.setattr(f"kron_kernels.{name}", 0.0)
    for name in ("_LAYER_SECONDS", "_MODEL_SECONDS"):
        monkeypatch.setattr(f"kroneckerbert.measure.{name}", 0.0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(str(folder)).state_dict()
