"""csrc/example as a C++ user compiles it: without Python, torch or a build system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, tiny_bert
from transformers import AutoModel, ElectraConfig, MPNetConfig, RobertaConfig

from kron_kernels.backends import abi
from kron_kernels.testing import assert_close
from kroneckerbert import compress, decompress, save_encoder

EXAMPLE = Path(__file__).resolve().parents[2] / "csrc" / "example"
CXX = os.environ.get("CXX", "c++")
TEXTS = [[2, 7, 9, 3], [2, 5, 6, 7, 8, 11, 12, 3], [4]]
MODELS = {
    "bert": tiny_bert,
    "roberta": lambda: AutoModel.from_config(RobertaConfig(**SIZES)),
    "mpnet": lambda: AutoModel.from_config(MPNetConfig(**SIZES)),
    "electra": lambda: AutoModel.from_config(ElectraConfig(**SIZES, embedding_size=16)),
}
# Terms of the longest sums of two layers and of the embeddings, and the keys.
TERMS = 2 * (5 * 32 + 64 + 8) + 3 * 32

pytestmark = pytest.mark.skipif(not shutil.which(CXX.split()[0]), reason="no C++ compiler")
written_by_python = pytest.mark.skipif(abi.module is None, reason=str(abi.missing))


def build(folder: Path, **variables: str) -> Path:
    command = [EXAMPLE / "build.sh", folder]
    built = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def run(program: Path, *arguments: object, text: str = "") -> str:
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    flags = "-O0 -Werror -Wall -Wextra"
    return build(tmp_path_factory.mktemp("programs") / "a folder", CUDA_ARCH="", CXXFLAGS=flags)


def test_the_cpu_result_is_right(programs):
    output = run(programs / "example")
    assert output.startswith("CPU: right")
    assert "GPU" not in output


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_gpu_result_is_right_or_the_reason_is_printed(tmp_path):
    lines = run(build(tmp_path, CXXFLAGS="-O0") / "example").splitlines()
    assert lines[0].startswith("CPU: right")
    assert lines[1].startswith(("GPU: right", "GPU: not tried: "))


def student(name: str):
    """Layers of every kind, and weights so large that each one matters."""
    dense = MODELS[name]()
    width = dense.embeddings.word_embeddings.embedding_dim
    query, key = ("attn.q", "attn.k") if name == "mpnet" else ("self.query", "self.key")
    factors = {
        "word_embeddings": {"a_shape": [64, width // 8], "rank": 2},
        f"attention.{query}": {"a_shape": [8, 4]},
        f"attention.{key}": [{"a_shape": [2, 4]}, {"a_shape": [32, 1], "rank": 5}],
        "intermediate.dense": {"a_shape": [4, 2]},
        "output.dense": {"a_shape": [32, 1], "rank": 7},
    }
    model = compress(dense, factors).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def embeddings(program: Path, file: Path, *arguments: object) -> list[torch.Tensor]:
    """What the program prints for each of the texts: the first token's vector and the mean."""
    text = "\n".join(" ".join(map(str, ids)) for ids in TEXTS)
    lines = [line.split() for line in run(program, file, *arguments, text=text).splitlines()]
    assert [name for name, *_ in lines] == ["first", "mean"] * len(TEXTS)
    return [torch.tensor(list(map(float, numbers))) for _, *numbers in lines]


@written_by_python
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_embeddings_of_a_saved_student_are_pythons(programs, tmp_path, name):
    model = student(name)
    found = embeddings(programs / "encode", save_encoder(model, tmp_path / "out"))
    dense = decompress(model).double()
    expected = []
    for ids in TEXTS:
        states = dense(torch.tensor([ids])).last_hidden_state[0]
        expected += [states[0], states.mean(0)]
    assert_close(name, torch.stack(found), torch.stack(expected), TERMS)
    # The number of threads does not change a bit.
    again = embeddings(programs / "encode", tmp_path / "out" / "encoder.safetensors", 3)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@written_by_python
def test_bad_input_is_refused_in_words(programs, tmp_path):
    file = save_encoder(student("bert"), tmp_path / "out")
    tensors = load_file(file)

    def refused(path: Path, text: str = "2 7 3\n") -> str:
        command = [programs / "encode", path]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        return done.stderr

    assert "not a row of its table" in refused(file, "2 64 3\n")
    assert "40 tokens are more than the 32 positions" in refused(file, "7 " * 40)
    assert "line 2 has something other than ids" in refused(file, "2 3\n2 x 3\n")
    assert "line 1 has no ids" in refused(file, "\n")
    assert "cannot be read" in refused(tmp_path / "none")
    bad = tmp_path / "bad.safetensors"
    for size in (4, 100, 3000, file.stat().st_size - 1):  # cut short
        bad.write_bytes(file.read_bytes()[:size])
        assert refused(bad)
    bad.write_bytes((8).to_bytes(8, "little") + b'{"x": 1}')
    assert "lacks {" in refused(bad)
    save_file(tensors, bad)
    assert "does not say its" in refused(bad)
    bad.write_bytes(file.read_bytes().replace(b'"F32"', b'"F16"'))
    assert "is of dtype F16" in refused(bad)


@written_by_python
def test_a_model_that_is_not_served_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="does not compute a BertModel"):
        save_encoder(tiny_bert(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
