"""Exports, loaded and run; compressed models in other precisions and compilers."""

import copy
import importlib
import json
import logging
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, GPT2Config, LlamaConfig

import kroneckerbert
from kron_kernels import KroneckerLinear
from kroneckerbert import KroneckerBertConfig, KroneckerPreTrainedModel
from kroneckerbert.files import CHECKSUMS, replace_folder
from kroneckerbert.serving import layer_by_layer

deploy = tiny.exporting()
export, load_exported = deploy.export, deploy.load_exported
load_trusted = partial(load_exported, trust_remote_code=True)
SIZES = tiny.SIZES | {"intermediate_size": 128, "num_hidden_layers": 1}
BASE = BertConfig(**SIZES)
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"]
HEADS += ["ForTokenClassification"]
PRECISION = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _padding_is_computed():
    """As in an exported program."""
    with layer_by_layer():
        yield


def model_with(head: str, layers: int = 1) -> KroneckerPreTrainedModel:
    """A model with weights so large that every layer matters."""
    config = KroneckerBertConfig.preset(
        "kronecker-bert-21", BASE, initializer_range=0.2, num_hidden_layers=layers
    )
    return getattr(kroneckerbert, f"KroneckerBert{head}")(config).eval()


def batch(rows: int, tokens: int, names=("input_ids", "attention_mask", "token_type_ids")):
    """A batch whose first row is padded."""
    x = {
        "input_ids": torch.randint(64, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "token_type_ids": torch.randint(2, (rows, tokens)),
    }
    x["attention_mask"][0, tokens // 2 :] = 0
    return {name: x[name] for name in names}


def assert_near(actual, expected, roundings=2**10) -> None:
    """Every output, relative to its largest entry."""
    assert list(actual) == list(expected)
    for name in expected:
        unit = PRECISION * expected[name].abs().max()
        error = (actual[name] - expected[name]).abs().max() / unit
        assert error <= roundings, f"{name}: {error:.0f} roundings"


def assert_damage_is_found(folder) -> None:
    """Flip a bit of, cut and remove each file; then again without checksums."""
    files = [file for file in folder.iterdir() if file.name not in (".kroneckerbert", CHECKSUMS)]
    assert {"config.json", "export.json"} < {file.name for file in files}
    for file in files:
        whole, half = file.read_bytes(), file.stat().st_size // 2
        for damage in (whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]):
            file.write_bytes(damage)
            with pytest.raises(OSError, match=rf"{file} is damaged: .*export again"):
                load_trusted(folder)
        file.unlink()
        with pytest.raises(OSError, match=rf"{file} is missing.*export again"):
            load_trusted(folder)
        file.write_bytes(whole)
    load_trusted(folder)
    (folder / CHECKSUMS).unlink()
    load_trusted(folder)
    for file in files:
        if not file.name.startswith(("tokenizer", "special")):
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(OSError, match=rf"{folder}.* cannot be read .*export again"):
                load_trusted(folder)
            file.write_bytes(whole)
    about = folder / "export.json"
    for damage in ("[]", "null", "{}", '{"export_format": [1]}', "[" * 10**5):
        about.write_text(damage)
        with pytest.raises(OSError, match=rf"{about} cannot be read .*export again"):
            load_trusted(folder)


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    """An ONNX masked language model, its export's result and the model."""
    pytest.importorskip("onnxruntime", reason="pip install 'kron-kernels[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'kron-kernels[onnx]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports") / "new" / "onnx"
    model = model_with("ForMaskedLM").train()
    result = export(model, folder, tokenizer=tiny.tiny_tokenizer(["a", "b"]))
    return folder, result, model


def test_onnx_computes_the_same(onnx_folder):
    folder, result, model = onnx_folder
    assert model.training and not (folder.parent / ".onnx.kroneckerbert-partial").exists()
    model = copy.deepcopy(model).eval()
    exported = load_exported(folder)

    for rows, tokens in ((1, 1), (5, 32)):
        x = batch(rows, tokens)
        with torch.inference_mode():
            assert_near(exported(**x), model(**x))

    assert result.shapes == [(2, 16), (1, 8), (3, 16)]
    assert result.bytes == sum((folder / f"model.onnx{s}").stat().st_size for s in ("", ".data"))
    (difference,) = result.differences.values()
    assert 0 < difference.worst <= 2**10 * PRECISION * difference.scale
    assert difference.cosine == pytest.approx(1)
    lines = str(result).splitlines()
    assert len(lines) == 3
    assert lines[0] == f"{folder}: onnx, {result.bytes / 1e6:.2f} MB"
    assert "2x16, 1x8, 3x16" in lines[1] and lines[2].startswith("  logits: at most ")


@pytest.mark.parametrize("tolerance", [float("nan"), -1, "1e-3", None.__class__])
def test_an_invalid_tolerance_is_refused_before_the_export(tmp_path, monkeypatch, tolerance):
    monkeypatch.setattr(deploy, "_exported", None)  # calling it would raise
    with pytest.raises(ValueError, match=r"tolerance = .* must be a finite number"):
        export(model_with("Model"), tmp_path / "out", tolerance=tolerance)
    assert not list(tmp_path.iterdir())


def test_damaged_files_of_an_export_are_named(onnx_folder, tmp_path):
    """A runtime loads weights with a flipped bit without an error."""
    assert_damage_is_found(Path(shutil.copytree(onnx_folder[0], tmp_path / "copy")))


def test_onnx_runs_without_this_project(onnx_folder):
    """In bare ONNX Runtime, by the stock operators, on the tokenizer's arrays."""
    import onnx

    folder, _, model = onnx_folder
    graph = onnx.load(folder / "model.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)

    code = (
        "import sys, numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})\n"
        "ids = np.array([[2, 5, 6, 3]])\n"
        "x = dict(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=0 * ids)\n"
        "np.save(sys.argv[1], session.run(['logits'], x)[0])\n"
        "assert 'torch' not in sys.modules and 'kron_kernels' not in sys.modules\n"
    )
    file = folder.parent / "logits.npy"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.inference_mode():
        expected = copy.deepcopy(model).eval()(input_ids=ids).logits
    assert_near({"y": torch.from_numpy(np.load(file))}, {"y": expected})
    assert BertTokenizer.from_pretrained(folder)("a b")["input_ids"] == [2, 5, 6, 3]


def test_int8_quantises_every_layer(tmp_path):
    """Quantisation would skip a factor whose transpose in the graph is not folded."""
    onnx = pytest.importorskip("onnx", reason="pip install 'kron-kernels[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'kron-kernels[onnx]'")
    # Factors of 128 x 128: constants of some kilobytes are folded anyway.
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 512}
    wide = tiny.tiny_config(num_hidden_layers=1, **sizes)
    config = KroneckerBertConfig.preset("kronecker-bert-8", wide, initializer_range=0.1)
    model = kroneckerbert.KroneckerBertForMaskedLM(config)
    result = export(model, tmp_path / "int8", quantize="int8-dynamic")

    ops = [node.op_type for node in onnx.load(tmp_path / "int8" / "model.onnx").graph.node]
    # Of each of six layers the large product, the head's transform, and the decoder's A.
    assert ops.count("MatMulInteger") == 6 + 1 + 1
    (difference,) = result.differences.values()
    # Rounding to 8 bits shows, and the result is still near.
    assert 1e-4 * difference.scale < difference.worst < 0.2 * difference.scale
    assert 0.99 < difference.cosine < 1
    assert "onnx, int8-dynamic" in str(result) and "cosine similarity 0.99" in str(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", [*HEADS[:2], *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[2:])]
)
def test_torch_export_of_every_head_is_silent(head, tmp_path, capfd, caplog):
    model = model_with(head)
    # The exporters warn of their versions, of a missing torchvision and more at each call.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = export(model, tmp_path / "pt2", format="torch_export")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")

    program = torch.export.load(tmp_path / "pt2" / "model.pt2")
    assert not [n for n in program.graph.nodes if "kron_kernels" in str(n.target)]
    assert any("aten" in str(node.target) for node in program.graph.nodes)
    x = batch(4, 20)
    with torch.inference_mode():
        expected = model(**x)
        assert_near(load_trusted(tmp_path / "pt2")(**x), expected)
    assert list(result.differences) == list(expected)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_decoders_without_their_cache(name, tmp_path):
    common = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        dense = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=32, **common)
    else:
        dense = LlamaConfig(**SIZES | common)
    config = kroneckerbert.register(type(dense)).preset("kronecker-bert-8", dense)
    head = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[name]
    model = getattr(kroneckerbert, f"Kronecker{head}")(config).eval()
    assert any(isinstance(m, KroneckerLinear) for m in model.modules())

    result = export(model, tmp_path / "pt2", format="torch_export")

    assert list(result.differences) == ["logits"]
    x = batch(3, 20, ("input_ids", "attention_mask"))
    x["attention_mask"].fill_(1)
    with torch.inference_mode():
        expected = {"logits": model(**x, use_cache=False).logits}
        assert_near({"logits": load_trusted(tmp_path / "pt2")(**x).logits}, expected)


def test_a_sample_names_the_inputs(tmp_path):
    model = BertForMaskedLM(BASE)  # dense models are welcome, too
    sample = batch(1, 5, ("input_ids",))
    result = export(model, tmp_path / "pt2", format="torch_export", sample=sample)

    assert result.shapes == [(1, 5), (1, 2), (2, 5)]
    assert list(load_trusted(tmp_path / "pt2").runners["model"].metadata.kwargs) == ["input_ids"]


def test_a_static_export_takes_its_sample_only(tmp_path):
    model = model_with("Model")
    sample = batch(2, 6)
    result = export(model, tmp_path / "pt2", format="torch_export", sample=sample, dynamic=False)

    assert result.shapes == [(2, 6)]
    with pytest.raises((RuntimeError, AssertionError)):
        load_trusted(tmp_path / "pt2")(**batch(2, 7))
    assert_damage_is_found(tmp_path / "pt2")


@pytest.mark.slow
def test_openvino(tmp_path):
    pytest.importorskip("openvino", reason="pip install 'kron-kernels[openvino]'")
    model = model_with("ForSequenceClassification")
    export(model, tmp_path / "ov", format="openvino")

    x = batch(5, 31)
    with torch.inference_mode():
        assert_near(load_exported(tmp_path / "ov")(**x), model(**x))
    assert_damage_is_found(tmp_path / "ov")


@pytest.mark.slow
def test_aoti(tmp_path):
    model = model_with("ForSequenceClassification")
    result = export(model, tmp_path / "aoti", format="aoti")

    x = batch(5, 31)
    with torch.inference_mode():
        assert_near(load_trusted(tmp_path / "aoti")(**x), model(**x))
    assert result.bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_onnx_of_every_head(head, tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'kron-kernels[onnx]'")
    model = model_with(head)
    result = export(model, tmp_path / "onnx")
    with torch.inference_mode():
        assert list(result.differences) == list(model(**batch(1, 4)))


@pytest.mark.slow
def test_another_function_is_an_error_and_the_old_folder_stays(tmp_path, monkeypatch):
    folder = tmp_path / "pt2"
    with replace_folder(folder) as new:
        (new / "model.pt2").write_text("an earlier export")

    class Wrong(deploy.DynamoExporter):
        export_format = "dynamo"

        def export_program(self, model, *args, **kwargs):
            model = copy.deepcopy(model)
            model.encoder.layer[0].output.LayerNorm.bias.data[3] += 1e-2
            return super().export_program(model, *args, **kwargs)

    monkeypatch.setattr(deploy, "get_exporter_class", lambda name: Wrong)
    with pytest.raises(ValueError, match=r"torch_export export computes something else: last_h"):
        export(model_with("Model"), folder, format="torch_export")
    assert (folder / "model.pt2").read_text() == "an earlier export"
    assert [f.name for f in tmp_path.iterdir()] == ["pt2"]

    export(model_with("Model"), folder, format="torch_export", tolerance=0.1)
    assert (folder / "model.pt2").read_bytes() != b"an earlier export"


def test_nan_is_a_difference(tmp_path):
    model = model_with("Model")
    model.encoder.layer[0].output.LayerNorm.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="nan off"):
        export(model, tmp_path / "pt2", format="torch_export")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(tmp_path):
    model, out = model_with("Model"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"format = 'tflite' must be one of onnx, openvino"):
        export(model, out, format="tflite")
    with pytest.raises(ValueError, match=r"'int8' must be None or 'int8-dynamic'"):
        export(model, out, quantize="int8")
    with pytest.raises(ValueError, match=r"use format='onnx', not 'torch_export'"):
        export(model, out, format="torch_export", quantize="int8-dynamic")
    with pytest.raises(ValueError, match=r"in torch.bfloat16.*model.float\(\)"):
        export(copy.deepcopy(model).bfloat16(), out, format="torch_export")
    with pytest.raises(ValueError, match=r"but input_ids is not; pass tokenizer"):
        export(model, out, format="torch_export", sample={"input_ids": torch.ones(3)})
    with pytest.raises(
        ValueError, match=r"sample has 'token_type_id', .* write one of token_type_ids"
    ):
        sample = batch(2, 4) | {"token_type_id": torch.ones(2, 4)}
        export(model, out, format="torch_export", sample=sample)
    with pytest.raises(ValueError, match=r"labels.*remove them"):
        sample = batch(2, 4) | {"labels": torch.ones(2, 4)}
        export(model, out, format="torch_export", sample=sample)
    with pytest.raises(TypeError, match=r"cannot export a Linear.*merge_and_unload"):
        export(nn.Linear(2, 2), out)
    with pytest.raises(FileNotFoundError, match=r"no export.json.*exporting\.export"):
        load_exported(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="not written by kroneckerbert"):
        export(model, out, format="torch_export")
    assert [f.name for f in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("format, ours", [("dynamo", "torch_export"), ("aoti", "aoti")])
def test_a_program_that_runs_code_needs_trust(format, ours, tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"export_format": format}))
    with pytest.raises(ValueError, match=f"'{ours}', which runs code .* trust_remote_code=True"):
        load_exported(tmp_path)


@pytest.mark.parametrize(
    "format, package", [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "openvino")]
)
def test_a_missing_package_is_one_line(format, package, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ImportError) as caught:
        export(model_with("Model"), tmp_path / "out", format=format)
    expected = f"format {format!r} needs {package}: pip install 'kron-kernels[{format}]'"
    assert str(caught.value) == expected
    (tmp_path / "export.json").write_text(json.dumps({"export_format": format}))
    with pytest.raises(ImportError, match="needs"):
        load_exported(tmp_path)


def test_an_old_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)
    monkeypatch.delitem(sys.modules, "kroneckerbert.exporting")
    with pytest.raises(ImportError, match=r"pip install -U 'transformers>=5\.23'"):
        importlib.import_module("kroneckerbert.exporting")


# The compressed model itself, in other precisions and compilers.


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_is_float32_rounded(head):
    """16-bit layers round activations once each: a random walk of some twenty roundings."""
    model = model_with(head, layers=2)
    x = batch(3, 20)
    with torch.inference_mode():
        expected = model(**x)
        actual = copy.deepcopy(model).to(torch.bfloat16)(**x)

    eps = torch.finfo(torch.bfloat16).eps
    for name in expected:
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].float() - expected[name]).square().mean().sqrt()
        scale = expected[name].square().mean().sqrt()
        assert 0 < error <= 20**0.5 * eps * scale, f"{name}: {error / scale / eps:.1f}"


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", pytest.param("ForSequenceClassification", marks=pytest.mark.slow)]
)
def test_compiles_in_one_graph_for_any_shape(head):
    model = model_with(head)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows, tokens in ((2, 8), (5, 31)):
            x = batch(rows, tokens)
            assert_near(compiled(**x), model(**x))
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_computes_the_same():
    model = model_with("ForMaskedLM")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, tokens in ((2, 8), (5, 31)):
            x = batch(rows, tokens)
            assert_near(compiled(**x), model(**x))


def test_torch_export_by_hand():
    """Without transformers' exporters."""
    model = model_with("ForSequenceClassification")
    tokens = torch.export.Dim("tokens", min=2, max=32)
    x = batch(2, 8)
    shapes = {name: {1: tokens} for name in x}
    program = torch.export.export(model, (), x, dynamic_shapes=shapes, strict=False)

    assert not [n for n in program.graph.nodes if "kron_kernels" in str(n.target)]
    x = batch(2, 31)
    with torch.inference_mode():
        assert_near(program.module()(**x), model(**x))


def test_stock_int8_takes_the_dense_layers():
    """``torch.ao`` quantises the dense layers, here the pooler and a head; factors stay."""
    model = model_with("ForSequenceClassification")
    dense = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert dense == ["bert.pooler.dense", "classifier"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    dynamic = torch.ao.nn.quantized.dynamic.Linear
    assert [n for n, m in small.named_modules() if isinstance(m, dynamic)] == dense
    kept = [m for m in small.modules() if isinstance(m, KroneckerLinear)]
    assert len(kept) == 6
    x = batch(3, 20)
    with torch.inference_mode():
        y, expected = small(**x).logits, model(**x).logits
    error = (y - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.1
    assert torch.cosine_similarity(y.flatten(), expected.flatten(), 0) > 0.99


def test_shapes_propagate_without_data():
    """Compilers and exporters ask for shapes first."""
    model = model_with("ForMaskedLM")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(3, 7, dtype=torch.long)
        assert model(input_ids=ids).logits.shape == (3, 7, 64)
