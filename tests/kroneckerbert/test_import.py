"""The import of the package: quick, lazy, and registered with transformers in any order."""

import subprocess
import sys

import pytest
from tiny import exporting, tiny_bert, tiny_tokenizer
from transformers import BertForSequenceClassification

import kroneckerbert
from kroneckerbert import compress


def run(code: str, *arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_found_and_listed():
    exporting()
    assert sorted(kroneckerbert._MODULES) == sorted(kroneckerbert.__all__)
    for name in kroneckerbert.__all__:
        value = getattr(kroneckerbert, name)
        assert value.__module__.startswith(f"kroneckerbert.{kroneckerbert._MODULES[name]}")
    assert set(kroneckerbert.__all__) <= set(dir(kroneckerbert))
    assert kroneckerbert.calibration.second_moments is kroneckerbert.second_moments
    for name in ("no_such_name", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(kroneckerbert, name)


@pytest.mark.parametrize("module", ["kroneckerbert", "kroneckerbert.cli.app"])
def test_the_package_and_its_command_line_are_imported_without_torch(module):
    run(f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)")


def test_help_of_every_command_and_the_list_of_recipes_are_printed_without_torch():
    run(
        """
import sys
from typer.testing import CliRunner
from typer.main import get_command
from kroneckerbert.cli.app import app
commands = get_command(app).commands
assert {"compress", "distill", "recipes"} <= set(commands)
for arguments in (["--help"], ["recipes"], *([name, "--help"] for name in commands)):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output)
    assert "Usage: " in done.output or arguments == ["recipes"]
    heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    )


def test_pipelines_and_sentence_transformers_load_models_after_reloads_and_in_threads(tmp_path):
    model = compress(tiny_bert(BertForSequenceClassification))
    for folder, saved in (("classifier", model), ("encoder", model.bert)):
        saved.save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    run(
        """
import importlib, pickle, sys, threading
import kroneckerbert
importlib.reload(kroneckerbert)
threads = [
    threading.Thread(target=importlib.import_module, args=(name,))
    for name in ("transformers.models.auto.modeling_auto", "kroneckerbert.conversion") * 2
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
from transformers import AutoConfig, AutoModel, CONFIG_MAPPING, pipeline
answer = pipeline("text-classification", model=sys.argv[1] + "/classifier")("a film")
assert answer[0]["label"].startswith("LABEL_")
model = AutoModel.from_pretrained(sys.argv[1] + "/encoder")
assert type(model) is kroneckerbert.KroneckerBertModel
importlib.reload(kroneckerbert)
assert type(AutoModel.from_pretrained(sys.argv[1] + "/encoder")) is type(model)
assert type(pickle.loads(pickle.dumps(model))) is type(model)
config = AutoConfig.for_model("kronecker_bert", num_hidden_layers=0)
assert type(AutoModel.from_config(config)) is type(model)
finders = [f for f in sys.meta_path if type(f).__module__ == "kroneckerbert"]
assert len(finders) == 1
assert "kronecker_kronecker_bert" not in CONFIG_MAPPING
from sentence_transformers import SentenceTransformer
words = SentenceTransformer(sys.argv[1] + "/encoder", device="cpu")
assert type(words[0].auto_model) is type(model)
assert words.encode(["a film"]).shape == (1, 32)
""",
        tmp_path,
    )


def test_attributes_are_names_and_submodules_only():
    from kroneckerbert import distillation

    for name in ("__main__", "a.b", "..", "calibration.x", "nothing"):
        assert not hasattr(kroneckerbert, name) and not hasattr(distillation, name)
    assert {"compress", "export"} <= {*dir(kroneckerbert)}
    assert "DistillationTrainer" in dir(distillation)
    assert distillation.trainer.DistillationTrainer is distillation.DistillationTrainer


IN_THREADS = """
import sys, threading
def importing():
    while "transformers.models.auto.configuration_auto" not in sys.modules:
        pass
    import kroneckerbert
thread = threading.Thread(target=importing)
thread.start()
from transformers import CONFIG_MAPPING
thread.join()
import kroneckerbert
assert "kronecker_bert" in CONFIG_MAPPING
"""


def test_importing_while_another_thread_imports_transformers():
    run(IN_THREADS)
