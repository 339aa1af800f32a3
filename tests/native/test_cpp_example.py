"""csrc/example as a C++ user compiles it: without Python, torch or a build system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SIZES, tiny_bert
from transformers import AutoModel, ElectraConfig, MPNetConfig, RobertaConfig

from kron_kernels.backends import abi
from kron_kernels.testing import assert_close
from kroneckerbert import compress, decompress, dequantize, quantize, save_encoder

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


def int8_student():
    """Tables, dense layers, Kronecker products and low rank: a large factor of each in int8."""
    factors = {
        "word_embeddings": {"a_shape": [64, 32], "rank": 2},
        "self.query": {"a_shape": [2, 2], "rank": 2},
        "self.key": {"a_shape": [64, 1], "rank": 32},
        "intermediate.dense": {"a_shape": [2, 2]},
        "output.dense": [{"a_shape": [2, 4]}, {"a_shape": [64, 1], "rank": 16}],
    }
    model = compress(tiny_bert(hidden_size=64, intermediate_size=128), factors).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return quantize(model)


@written_by_python
@torch.no_grad()
def test_the_embeddings_of_an_int8_student_are_pythons(programs, tmp_path):
    model = int8_student()
    file = save_encoder(model, tmp_path / "out")
    in_int8 = {name for name, t in load_file(file).items() if t.dtype == torch.int8}
    factors = "query.0.b", "key.0.a", "key.0.b", "value.0.weight", "up.0.b", "down.1.a", "down.1.b"
    assert {"tables.0.a", *(f"layers.1.{factor}" for factor in factors)} <= in_int8

    found = torch.stack(embeddings(programs / "encode", file))
    expected, unrounded = [], []
    for states_of, rows in ((model, expected), (dequantize(model), unrounded)):
        for ids in TEXTS:
            states = states_of(torch.tensor([ids])).last_hidden_state[0]
            rows += [states[0], states.mean(0)]
    # The arithmetic is the same, but a compiler may fuse sums in another way. An error of float32
    # carries one in some 20,000 numbers past a half, which then changes by a unit. Of n numbers,
    # all rounded by up to half a unit, k such ones make up sqrt(12 k / n) of int8's error: about a
    # fortieth.
    noise = (torch.stack(unrounded) - torch.stack(expected)).norm()
    assert (found - torch.stack(expected)).norm() < 0.1 * noise
    again = torch.stack(embeddings(programs / "encode", file, 3))
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@written_by_python
def test_a_wrong_scale_is_refused_in_words(programs, tmp_path):
    file = save_encoder(int8_student(), tmp_path / "out")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)

    def refused(name: str, changed: torch.Tensor | None) -> str:
        new = tensors | {name: changed}
        bad = tmp_path / "bad.safetensors"
        save_file({name: t for name, t in new.items() if t is not None}, bad, metadata)
        command = [programs / "encode", bad]
        done = subprocess.run(command, input="2 7 3\n", capture_output=True, text=True)
        assert done.returncode == 1 and not done.stdout
        return done.stderr

    dense = "layers.1.value.0.weight"
    scale = f"{dense}_scale"
    assert f"{dense} is in int8, but the file has no {scale}" in refused(scale, None)
    wrong = f"{scale} must have 64 numbers of dtype F32"
    assert wrong in refused(scale, tensors[scale][1:].clone())
    assert wrong in refused(scale, tensors[scale].to(torch.int8))
    assert f"{scale}, but {dense} is not in int8" in refused(dense, tensors[dense].float())
    columns = "layers.1.key.0.a_scale"  # 32 terms share them
    own = tensors[columns].repeat(32, 1, 1)
    assert "columns must share their scales" in refused(columns, own)


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
