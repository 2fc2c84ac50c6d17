"""Every command on a tiny model; every mistake gets its sentence and exit code 2."""

import io
import json
import shlex
import subprocess
import sys

import huggingface_hub.constants
import pytest
from transformers import DeepseekV3Config, MambaConfig, T5Config

from bitkv import benchmark, evaluation
from bitkv.attention import BACKENDS
from bitkv.cli import bench, build_parser, comparison, evaluate, generate, main, recipes
from bitkv.files import write_json
from bitkv.generation.request import Run
from bitkv.recipe import PRESETS

DOCUMENT = "".join(f"{i}: the key of room {i} is {i * i % 97}.\n" for i in range(20))
COMMANDS = ("generate", "recipes", "bench", "eval")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "long.txt").write_text("x" * 2000)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "damaged.kv").write_bytes(b"\x00" * 100)
    (tmp_path / "bad.recipe").write_text("kivi2 please")
    (tmp_path / "nothing").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    DeepseekV3Config(num_hidden_layers=1).save_pretrained(tmp_path / "mla")
    return tmp_path


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"\nexamples:\n  bitkv {command}" in out


def test_help_names_all_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"bitkv {command}" in out for command in COMMANDS)


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from bitkv.cli import build_parser; build_parser().format_help();"
        "print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "bitkv", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "bitkv 0.1.0\n")


@pytest.mark.parametrize("command", [generate, recipes, bench, evaluate])
def test_examples_parse(command):
    examples = [line.partition("bitkv ")[2] for line in command.EXAMPLES.splitlines()]
    assert [build_parser().parse_args(shlex.split(line)) for line in examples if line]


def test_recipes_table_and_json(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    assert "arXiv 2402.02750" in out
    assert "kivi2 = Recipe(key=Affine(bits=2," in out
    code, out, _ = run(capsys, "recipes", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["kivi2"]["bits_per_element"] == [3.0]
    assert rows["fp16"]["bits_per_element"] == [16.0]
    assert rows["asymkv(16, 0)"]["bits_per_element"] == [2.5, 2.0]


def test_generate_streams_text_and_reports_figures(capsys, saved_model, document, tmp_path):
    file = tmp_path / "run.json"
    code, out, err = run(
        capsys, "generate", saved_model, "--file", document, "--prompt", "0: ", "--max-new-tokens", 8,
        "--json", file,
    )  # fmt: skip
    [figures] = json.loads(file.read_text())
    assert code == 0
    assert out == figures["text"] + "\n"
    assert f"{len(DOCUMENT) + 4} tokens read" in " ".join(err.split())
    assert "3.00 beyond the hot window" in " ".join(err.split())


def test_generate_reads_standard_input(capsys, saved_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("room"))
    code, _, err = run(capsys, "generate", saved_model, "--max-new-tokens", 2, "--recipe", "int8")
    assert code == 0
    assert "5 tokens read" in err


def test_a_document_is_read_once(capsys, saved_model, document, tmp_path):
    file = tmp_path / "document.kv"
    common = ("generate", saved_model, "--max-new-tokens", 2)
    assert run(capsys, *common, "--file", document, "--save-cache", file)[0] == 0
    code, _, err = run(capsys, *common, "--prompt", "0: ", "--load-cache", file)
    assert code == 0
    assert "3 tokens read" in err
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = run(capsys, *common, "--prompt", "0: ", "--load-cache", file)
    assert code == 2
    assert "damaged" in err
    assert err.count("\n") == 1


def test_compare_prints_one_table(capsys, saved_model, document, tmp_path):
    file = tmp_path / "runs.json"
    code, out, _ = run(
        capsys, "generate", saved_model, "--file", document, "--recipe", "fp16", "--max-new-tokens", 6,
        "--dtype", "float32", "--compare", "--json", file,
    )  # fmt: skip
    stock, packed = (Run(**row) for row in json.loads(file.read_text()))
    assert code == 0
    lines = {line.strip().split("  ")[0]: line.split() for line in out.splitlines()}
    for field in (
        "cache MB",
        "bits per element",
        "beyond the hot window",
        "prefill s",
        "ms per token",
        "peak memory MB, prefill",
        "peak memory MB, decode",
    ):
        assert lines[field][-1].endswith("×"), field
    assert lines["first differing token"][-1] == "none"
    assert stock.token_ids == packed.token_ids
    assert out.count(stock.text.strip("\n").splitlines()[0]) >= 2
    assert min(stock.peak_prefill_bytes, packed.peak_prefill_bytes) > 0


def test_first_difference():
    assert comparison.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert comparison.first_difference([1, 2, 3], [1, 5, 3]) == 2
    assert comparison.first_difference([1, 2], [1, 2, 3]) == 3


def test_bench_writes_rows_and_a_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitkv.benchmark.request.read_bandwidth", lambda effort, **_: 20.0)
    monkeypatch.setattr("bitkv.benchmark.timing.last_level_cache", lambda: 1 << 20)
    rows, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    code, out, _ = run(
        capsys, "bench", "attention", "--recipe", "kivi2", "--recipe", "asymkv(1, 1)", "--context", 300,
        "--heads", "4/2", "--head-dim", 64, "--json", rows, "--plot", plot,
    )  # fmt: skip
    assert code == 0
    assert "GB/s" in out
    measured = {row["recipe"] for row in json.loads(rows.read_text())}
    assert {"kivi2", "asymkv(1, 1)"} < measured
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_pack_writes_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitkv.benchmark.request.read_bandwidth", lambda effort, **_: 20.0)
    file = tmp_path / "pack.json"
    code, out, err = run(
        capsys, "bench", "pack", "--recipe", "kivi2", "--context", 300, 100, "--kv-heads", 2,
        "--head-dim", 64, "--threads", 1, "--json", file,
    )  # fmt: skip
    assert code == 0
    assert "prompt (" in out
    assert err == "bitkv: kivi2: a prompt of 100 tokens packs no page; pass 192 or more\n"
    assert {row["operation"] for row in json.loads(file.read_text())} == {"pack", "prompt"}


def test_bench_decode_writes_rows_and_a_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bitkv.benchmark.request.read_bandwidth", lambda effort, **_: 20.0)
    for name, value in (("_HEADS", 4), ("_KV_HEADS", 2), ("_INTERMEDIATE", 64)):
        monkeypatch.setattr(f"bitkv.benchmark.decode.{name}", value)
    monkeypatch.setattr("bitkv.benchmark.decode.find_spec", lambda name: None)
    rows, plot = tmp_path / "decode.json", tmp_path / "decode.png"
    code, out, _ = run(
        capsys, "bench", "decode", "--recipe", "kivi2", "--context", 300, "--layers", 1, "--json", rows,
        "--plot", plot,
    )  # fmt: skip
    assert code == 0
    assert "pip install optimum-quanto" in out
    assert [row["recipe"] for row in json.loads(rows.read_text())] == ["dynamic", "kivi2"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_writes_rows_and_tables(capsys, saved_model, document, tmp_path):
    rows = tmp_path / "eval.json"
    code, out, _ = run(
        capsys, "eval", saved_model, "--recipe", "kivi2", "--text", document, "--tokens", 250,
        "--window", 250, "--task", "perplexity", "fidelity", "--json", rows,
    )  # fmt: skip
    assert code == 0
    assert "perplexity" in out
    assert {row["recipe"] for row in json.loads(rows.read_text())} == {"stock", "kivi2"}


def test_eval_of_a_stress_variant_on_another_text(capsys, saved_model, document, tmp_path):
    rows = tmp_path / "eval.json"
    code, out, _ = run(
        capsys, "eval", saved_model, "--recipe", "kivi2", "--text", document, "--ood", document,
        "--tokens", 250, "--window", 250, "--task", "ood", "--stress", "--json", rows,
    )  # fmt: skip
    assert code == 0
    assert "ood perplexity" in out
    assert [row["task"] for row in json.loads(rows.read_text())] == (
        ["ood perplexity"] * 2 + ["ood agreement"]
    )
    assert all(row["model"].endswith("+stress") for row in json.loads(rows.read_text()))


def test_eval_knows_all_tasks():
    assert set(evaluate.TASKS) == set(evaluation.TASKS)


SENTENCES = [
    (
        "",
        "the following arguments are required: COMMAND; see `bitkv --help`",
    ),
    (
        "generate m --top-p 1.5",
        "argument --top-p: '1.5' is not a number above 0 and at most 1; see `bitkv generate --help`",
    ),
    (
        "generate m --max-new-tokens 0",
        "argument --max-new-tokens: '0' is not a whole number from 1 on; see `bitkv generate --help`",
    ),
    (
        "generate m --temperature nan",
        "argument --temperature: 'nan' is not a number from 0 (greedy) on; see `bitkv generate --help`",
    ),
    (
        "bench",
        "the following arguments are required: WHAT; see `bitkv bench --help`",
    ),
    (
        "bench attention --heads 3/2",
        "argument --heads: '3/2' is not query heads over KV heads, such as 32/8, the first a "
        "multiple of the second; see `bitkv bench attention --help`",
    ),
    (
        "generate MODEL --prompt x --recipe kivi3",
        "recipe 'kivi3': no 'kivi3'; choose from PRESETS or write Recipe(key=..., value=...)",
    ),
    (
        "generate MODEL --prompt x --recipe @bad.recipe",
        "recipe 'kivi2 please' is not a recipe expression; choose from PRESETS or write "
        "Recipe(key=..., value=...)",
    ),
    (
        "generate MODEL --prompt x --recipe @none.recipe",
        "no file none.recipe",
    ),
    (
        "generate MODEL --prompt x --backend gpu",
        "no backend 'gpu'; choose from auto, BACKENDS",
    ),
    (
        "generate MODEL --prompt x --recipe Recipe(key=Affine(2,'channel'),value=Affine(2,'token',128))",
        "head_dim 64 is not a multiple of group_size 128; pass a group_size that divides 64, "
        "or 'page' for one group",
    ),
    (
        "generate MODEL --prompt x --device tpu",
        "device 'tpu' cannot be used (",
    ),
    (
        "generate MODEL --file none.txt",
        "no file none.txt",
    ),
    (
        "generate MODEL --file nothing",
        "nothing is a directory; pass a text file",
    ),
    (
        "generate MODEL --file latin1.txt",
        "latin1.txt is not UTF-8 text; convert it first",
    ),
    (
        "generate MODEL --file empty.txt",
        "the prompt is empty; pass a text with --prompt, --file or standard input",
    ),
    (
        "generate MODEL --file long.txt",
        "the prompt has 2,001 tokens and 64 new ones are asked for, but the model's context is"
        " 2,048; shorten the prompt or the answer by 17",
    ),
    (
        "generate MODEL --prompt x --demo --file long.txt",
        "--demo brings its own document; drop --file",
    ),
    (
        "generate MODEL --prompt x --compare --load-cache damaged.kv",
        "--compare reads the whole prompt in both runs; drop --save-cache, --load-cache",
    ),
    (
        "generate MODEL --prompt x --load-cache none.kv",
        "no cache file none.kv; save one first",
    ),
    (
        "generate MODEL --prompt x --load-cache damaged.kv",
        "damaged.kv is damaged or not a cache file (",
    ),
    (
        "generate MODEL --prompt x --json no/run.json",
        "no folder no for run.json; create it first",
    ),
    (
        "generate nothing --prompt x",
        "nothing has no config.json; pass the directory of a saved model",
    ),
    (
        "generate nothing/more --prompt x",
        "no model directory nothing/more; pass an existing one or a hub id (owner/name)",
    ),
    (
        "generate long.txt --prompt x",
        "long.txt is a file; pass the directory of a saved model or a hub id",
    ),
    (
        "generate no-owner/no-model --prompt x",
        "cannot load 'no-owner/no-model' from the hub; check the name and the connection, or "
        "pass a local directory",
    ),
    (
        "generate t5 --prompt x",
        "t5 is an encoder-decoder model; bitkv serves decoder-only models",
    ),
    (
        "generate mamba --prompt x",
        "mamba has no KV cache for bitkv to pack",
    ),
    (
        "generate mla --prompt x",
        "deepseek_v3 uses multi-head latent attention (MLA), whose cache is already "
        "compressed; bitkv serves models with keys and values per head",
    ),
    (
        "eval MODEL --text none.txt",
        "no file none.txt",
    ),
    (
        "eval MODEL --text long.txt --recipe kivi3",
        "recipe 'kivi3': no 'kivi3'; choose from",
    ),
    (
        "eval MODEL --text long.txt --task ood",
        "the task ood needs a text of another domain; pass one with --ood FILE",
    ),
    (
        "eval MODEL --task ood --ood none.txt",
        "no file none.txt",
    ),
    (
        "eval MODEL --text long.txt --samples 3 --depths 5",
        "depths is 5, with 3 samples a seed; pass 1 to 3",
    ),
    (
        "eval MODEL --text long.txt --keys 1",
        "keys is 1; pass 2 or more",
    ),
    (
        "eval MODEL --text long.txt --recipe kivi2 --task needle --length 600 --keys 40",
        "a prompt with 40 keys has 1,438 tokens, more than 600; pass fewer keys or a greater length",
    ),
    (
        "eval MODEL --text long.txt --recipe kivi2 --task needle --length 600 --keys 4000",
        "4000 keys are more than the 266 names there are; pass fewer",
    ),
    (
        "eval MODEL --text long.txt --recipe kivi2 --task divergence --length 200 --steps 199",
        "199 steps leave no prompt in a length of 200; pass fewer steps",
    ),
    (
        "bench attention --plot bench.gif",
        "cannot plot to 'bench.gif'; use a name that ends in .png or .html",
    ),
    (
        "bench attention --backend gpu",
        "no backend 'gpu'; choose from auto, all, BACKENDS",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), SENTENCES, ids=[line for line, _ in SENTENCES])
def test_bad_input_is_one_sentence(capsys, here, saved_model, line, sentence):
    argv = [str(saved_model) if word == "MODEL" else word for word in line.split()]
    code, out, err = run(capsys, *argv)
    sentence = sentence.replace("BACKENDS", ", ".join(BACKENDS)).replace("PRESETS", ", ".join(PRESETS))
    assert (code, out) == (2, "")
    assert err.startswith(f"bitkv: {sentence}")
    assert err.count("\n") == 1
    if not sentence.endswith(("(", "from")):
        assert err == f"bitkv: {sentence}\n"


def test_interrupt_leaves_files_as_they_were(capsys, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    file = tmp_path / "bench.json"
    file.write_text("[]")
    monkeypatch.setattr(benchmark, "run_attention", interrupted)
    code, _, err = run(capsys, "bench", "attention", "--json", file)
    assert (code, err) == (130, "bitkv: interrupted\n")
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert file.read_text() == "[]"


def test_a_dead_process_is_a_sentence(capsys, monkeypatch, saved_model):
    def die(*args, **kwargs):
        raise ChildProcessError("the generating process was killed by signal 9")

    monkeypatch.setattr(comparison, "generate_alone", die)
    code, _, err = run(capsys, "generate", saved_model, "--prompt", "x", "--compare")
    assert (code, err) == (1, "bitkv: the generating process was killed by signal 9\n")
