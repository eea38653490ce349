"""tools/push.py against a server on loopback that speaks the hub's API: what arrives, the card, what fails."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import peft
import pytest
import tiny
import torch
import transformers
import yaml

import config as configuration
from config import Config, ConfigError, EnvConfig, JudgeConfig, ModelConfig
from tools import push

TOKEN = "hf_SecretOfTheTest0123456789"
REPO = "someone/tiny-agent"
NASTY = [
    "<script>alert(1)</script><img src=x onerror=alert(2)></details>",
    "[click](javascript:alert(3)) ![seen](https://evil.example/pixel.png) https://evil.example",
    "``` and ```` end nothing",
    "```\n# Not a heading\n````text",
    "half a pair \ud83d, turned \u202eround, \x1b[31m, | a cell",
]
SHOWN = [
    *NASTY[:3],
    "``` # Not a heading ````text",
    "half a pair \ufffd, turned \ufffdround, \ufffd[31m, | a cell",
]
RATE = {"success": 0.525, "n": 600, "games": 200, "low": 0.45897, "high": 0.59016}
EVALUATION = {
    "checkpoint": "runs/tiny/checkpoints/latest",
    "temperature": 0.4,
    "seeds": 3,
    "levels": {
        "L0": RATE | {"types": {"pick": RATE | {"success": 0.1}, "`|<b>": RATE}},
        "L2": RATE | {"types": {}, "trained_on": ["pick"]},
    },
}


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `refuses` maps a part of a path to the status that requests to it get."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses: dict[str, int] = {}
        self.requests, self.commits, self.tokens = [], [], set()
        self.public, self.files, self.stored = {}, {}, {}  # repository: public; path: content; sha256: content

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that gave up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.requests.append((self.command, self.path))
        if not self.path.startswith("/storage/"):  # signed addresses
            hub.tokens.add(self.headers["Authorization"])
        for part, status in hub.refuses.items():
            if part in self.path:
                return self.answer({"error": f"no: {self.headers['Authorization']}"}, status)  # servers do echo keys
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            there = name in hub.public
            hub.public.setdefault(name, made.get("visibility") != "private")
            return self.answer({"url": f"{hub.url}/{name}", "error": "it is there"}, 409 if there else 200)
        if self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            return self.answer({"errors": [], "warnings": []}, 200 if yaml.safe_load(front) else 400)
        if self.path.startswith("/storage/"):
            if hashlib.sha256(body).hexdigest() != self.path[9:]:
                return self.answer({}, 422)
            hub.stored[self.path[9:]] = body
            return self.answer({})
        if self.path == f"/{REPO}.git/info/lfs/objects/batch":
            return self.answer({"objects": [self.place(one) for one in json.loads(body)["objects"]]})
        if self.path == f"/api/models/{REPO}/preupload/main":
            return self.answer({"files": [self.mode(one["path"]) for one in json.loads(body)["files"]]})
        if self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del hub.files[line["value"]["path"]]
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.stored[line["value"]["oid"]]
                else:
                    hub.commits.append(line["value"]["summary"])
            return self.answer({"commitUrl": f"{hub.url}/{REPO}/commit/1", "commitOid": "1" * 40})
        if self.path.startswith(f"/api/models/{REPO}"):
            there = [{"rfilename": name} for name in hub.files]
            return self.answer({"id": REPO, "private": not hub.public[REPO], "sha": "1" * 40, "siblings": there})
        return self.answer({"error": "no such path"}, 404)

    do_POST = do_PUT = do_GET

    def place(self, one: dict) -> dict:
        upload = {"upload": {"href": f"{self.server.url}/storage/{one['oid']}"}}
        return one | ({} if one["oid"] in self.server.stored else {"actions": upload})

    def mode(self, path: str) -> dict:
        large, there = path.endswith((".safetensors", ".png")), self.server.files.get(path)
        said = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            blob = hashlib.sha1(b"blob %d\0" % len(there) + there)
            said["oid"] = (hashlib.sha256(there) if large else blob).hexdigest()
        return said

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    """A running server, which this process takes for the hub; the client has read its environment long ago."""
    running = Hub()
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield running
    running.shutdown()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The newest checkpoint of a run that started from another, as train_rl.py leaves it but for the model's size."""
    shape = transformers.AutoConfig.from_pretrained(tiny.ROOT / "assets" / "base")
    shape.update(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    torch.manual_seed(0)
    write_run(tmp_path / "runs" / "cold", "final", model=ModelConfig(path="Qwen/Qwen2.5-0.5B"))
    env, judge = EnvConfig(name="alfworld"), JudgeConfig(enabled=True)
    model = ModelConfig(path="runs/cold/checkpoints/latest")
    folder = write_run(tmp_path / "runs" / "tiny", "000002", name="tiny", model=model, env=env, judge=judge)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.ROOT / "assets" / "base" / name, folder / name)
    (folder / "guidelines.json").write_text(json.dumps(NASTY))
    (folder / "trainer" / "critic").mkdir(parents=True)
    for name in ("state.pt", "optimizers_0.pt", "critic/model.safetensors"):
        (folder / "trainer" / name).write_bytes(b"not to be shared")
    return folder


def write_run(run: Path, at: str, **config) -> Path:
    """Write all of a run's folder that is read here but its checkpoint's files; return the checkpoint's folder."""
    folder = run / "checkpoints" / at
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(at)
    configuration.save(Config(**config), run / "config.yaml")
    lines = [{"iteration": i, "rollout/success": 0.1 * i, "judge/balanced_accuracy": 0.5} for i in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / f"eval_{at}.json").write_text(json.dumps(EVALUATION))
    (run / "machine.json").write_text(json.dumps({"CPU cores": "2", "torch": "2.13.0"}))
    return folder


def pushed(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
    push.main()


def card_of(folder: Path) -> str:
    return push.card(folder, push.report.read_run(folder.parent.parent), REPO, True)


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def in_a_process(hub: Hub, folder: Path, **extra: str) -> subprocess.CompletedProcess:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = tiny.command("tools/push.py", folder, REPO)
    home = {"HF_HOME": str(folder.parents[3] / "home")}
    return subprocess.run(command, env=tiny.environment(**own | home | extra), capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# What arrives


def test_the_checkpoint_arrives_as_it_is_without_its_trainer(hub, checkpoint):
    done = in_a_process(hub, checkpoint.with_name("latest"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"\n{hub.url}/{REPO}\n") and hub.tokens <= {f"Bearer {TOKEN}", None}
    ours = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "guidelines.json"} <= set(ours)
    made = {name: hub.files.pop(name) for name in ("README.md", "curves.png", "config.yaml")}
    assert hub.files == ours and hub.commits == ["tiny, 000002"] and hub.public == {REPO: True}
    assert made["config.yaml"] == (checkpoint.parents[1] / "config.yaml").read_bytes()
    assert made["curves.png"].startswith(b"\x89PNG") and made["README.md"].decode() == card_of(checkpoint)
    assert TOKEN not in done.stdout + done.stderr and not any(TOKEN.encode() in data for data in made.values())


def test_half_an_upload_is_finished_and_a_whole_one_repeated_at_no_cost(hub, checkpoint, monkeypatch):
    hub.refuses = {"/commit/": 500}
    with pytest.raises(ConfigError, match=f"refused the upload to {REPO} .*500.* then run this again"):
        pushed(monkeypatch, checkpoint, REPO)
    assert hub.stored and not hub.files
    hub.refuses = {}
    hub.requests.clear()
    pushed(monkeypatch, checkpoint, REPO)
    assert "PUT" not in dict(hub.requests) and "model.safetensors" in hub.files and len(hub.commits) == 1
    pushed(monkeypatch, checkpoint, REPO)
    assert len(hub.commits) == 1


def test_what_an_earlier_checkpoint_left_is_deleted(hub, checkpoint, monkeypatch):
    """An adapter's config would be read before the whole model; what is nobody's checkpoint stays."""
    stale = ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors")
    hub.files = {name: b"old" for name in (*stale, "notes.txt", "model.safetensors")}
    hub.public[REPO] = True
    pushed(monkeypatch, checkpoint, REPO)
    assert not set(stale) & set(hub.files) and hub.files["notes.txt"] == b"old"
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes() and len(hub.commits) == 1


def test_private_is_private_or_nothing(hub, checkpoint, monkeypatch):
    pushed(monkeypatch, checkpoint, REPO, "--private")
    assert hub.public == {REPO: False} and hub.files
    hub.public[REPO] = True
    hub.files.clear()
    with pytest.raises(ConfigError, match="public"):
        pushed(monkeypatch, checkpoint, REPO, "--private")
    assert not hub.files


def test_a_dry_run_needs_no_network_and_no_token(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    pushed(monkeypatch, checkpoint.with_name("latest"), REPO, "--dry-run")
    shown = capsys.readouterr().out
    listed, card = shown.split("nothing is uploaded; README.md:\n\n")
    assert "model.safetensors" in listed and "trainer" not in listed and card == card_of(checkpoint)
    assert not hub.requests


# ----------------------------------------------------------------------------------------------------------------------
# What the card says


def test_the_card_has_the_numbers(checkpoint):
    card = card_of(checkpoint)
    assert "| `L0` | 52.5 | 45.9 to 59.0 | 600 | 200 |" in card and "| `L0: pick` | 10.0 |" in card
    assert "`L2 (trained on these types)`" in card and "3 plays of each game, temperature 0.4" in card
    assert "(`grpo`) with generative classification disentanglement" in card and "`alfworld`" in card
    assert "torch: 2.13.0" in card and "advantage: grpo" in card and "![learning curves](curves.png)" in card
    assert front_of(card)["base_model"] == "Qwen/Qwen2.5-0.5B"  # what the cold start began with
    assert front_of(card)["library_name"] == "transformers" and "alfworld" in front_of(card)["tags"]


def test_a_checkpoint_that_was_not_evaluated_says_so(checkpoint):
    run = checkpoint.parents[1]
    (run / "eval_000002.json").rename(run / "eval_000004.json")  # another one's
    card = card_of(checkpoint)
    assert "not been evaluated; `python evaluate.py --ckpt runs/tiny/checkpoints/000002`" in card and "52.5" not in card
    (run / "eval_000002.json").write_text('{"levels": {"L0": {"success": 1}}}')
    with pytest.raises(ConfigError, match="eval_000002.json is not what evaluate.py writes"):
        card_of(checkpoint)


def test_curves_end_where_the_checkpoint_was_made(checkpoint):
    run = push.report.read_run(checkpoint.parents[1])
    assert push.draw(run, 2) == push.draw(run, 2) != push.draw(run, 4)
    assert push.draw(run, 0) == b""


def test_a_cold_start_is_called_one(checkpoint):
    cold = checkpoint.parents[2] / "cold" / "checkpoints" / "final"
    card = card_of(shutil.copytree(checkpoint, cold, dirs_exist_ok=True))
    assert "imitates an expert (a cold start)" in card and "reinforcement learning (" not in card


class Markup(HTMLParser):
    """What a reader of HTML would find: elements, where they lead, and the text that is not code."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found, self.leads, self.code, self.prose = set(), set(), "", ""
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.leads |= {value for name, value in attrs if name in ("href", "src")}
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.inside = self.inside or tag == "code"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "code"

    def handle_data(self, data):
        self.code, self.prose = self.code + data * self.inside, self.prose + data * (not self.inside)


def test_what_models_wrote_is_no_markup(checkpoint):
    markdown_it = pytest.importorskip("markdown_it")
    run = checkpoint.parents[1]
    settings = {
        "env": {"name": NASTY[0]},
        "algo": {"advantage": NASTY[1]},
        NASTY[2]: NASTY[3],
        "model": {"path": NASTY[1]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings, width=1000))
    (run / "machine.json").write_text(json.dumps(dict(zip(NASTY, NASTY, strict=True))))
    card = card_of(checkpoint)
    front, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["tags"][-1] == NASTY[0]
    page = Markup(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    allowed = "h1 h2 p a em pre code table thead tbody tr th td details summary img"
    assert page.found == set(allowed.split())
    assert page.leads == {"https://arxiv.org/abs/2509.23870", "curves.png"}
    for said in SHOWN:
        assert f"- {said}\n" in page.code
    assert not [said for said in ("evil", "alert", "heading", "half", "turned") if said in page.prose]


def test_the_code_of_the_card_loads_what_arrived(hub, checkpoint, tmp_path, monkeypatch):
    pushed(monkeypatch, checkpoint, REPO)
    loaded = run_code(hub, tmp_path / "arrived")
    weights = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert tiny.distance(loaded["model"].state_dict(), weights) == 0
    words = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    assert loaded["tokenizer"]("go to shelf 12").input_ids == words("go to shelf 12").input_ids
    assert configuration.load(tmp_path / "arrived" / "config.yaml").judge.enabled


def run_code(hub: Hub, folder: Path) -> dict:
    """Do as the card says, with the files that arrived."""
    folder.mkdir()
    for name, data in hub.files.items():
        (folder / name).write_bytes(data)
    (code,) = re.findall(r"```python\n(.*?)```", hub.files["README.md"].decode(), re.DOTALL)
    names: dict = {}
    exec(code.replace(REPO, str(folder)), names)
    return names


def test_an_adapter_names_its_base(hub, checkpoint, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapter = peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (checkpoint / name).unlink()
    adapter.save_pretrained(checkpoint)
    assert "Framework versions" in (checkpoint / "README.md").read_text()  # peft's own card gives way
    pushed(monkeypatch, checkpoint, REPO)
    card = hub.files["README.md"].decode()
    assert "Framework versions" not in card and f"An adapter, made of `{base}` (a folder" in card
    assert front_of(card)["library_name"] == "peft" and "base_model" not in front_of(card)  # a folder of this machine
    loaded = run_code(hub, tmp_path / "arrived")["model"]
    assert tiny.distance(loaded.state_dict(), adapter.state_dict()) == 0
    told = json.loads((checkpoint / "adapter_config.json").read_text()) | {"base_model_name_or_path": "Qwen/Qwen2.5-7B"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(told))
    assert front_of(card_of(checkpoint))["base_model"] == "Qwen/Qwen2.5-7B"
    shutil.copytree(base, tmp_path / "Qwen" / "Qwen2.5-7B")  # beside runs/: the run meant that folder
    assert "base_model" not in front_of(card_of(checkpoint))


# ----------------------------------------------------------------------------------------------------------------------
# What fails


@pytest.mark.parametrize(
    ("place", "status", "expected"),
    [
        ("/api/", 401, "does not know the token in $HF_TOKEN (401): make one at"),
        ("/api/", 403, f"the token in $HF_TOKEN may not write to {REPO} (403)"),
        ("/preupload/", 403, f"the token in $HF_TOKEN may not write to {REPO} (403)"),
        ("/api/repos/create", 400, f"refused the upload to {REPO} (Bad request"),
        ("/objects/batch", 401, "does not know the token in $HF_TOKEN (401): make one at"),
        ("/storage/", 403, f"the token in $HF_TOKEN may not write to {REPO} (403)"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(hub, checkpoint, monkeypatch, capfd, place, status, expected):
    hub.refuses = {place: status}
    with pytest.raises(ConfigError) as raised:
        pushed(monkeypatch, checkpoint, REPO)
    said = str(raised.value)
    assert expected in said and "\n" not in said and not hub.files
    assert TOKEN not in said + "".join(capfd.readouterr())


def test_a_refusal_ends_the_process_with_that_line_alone(hub, checkpoint):
    hub.refuses = {"/api/": 403}
    done = in_a_process(hub, checkpoint)
    line = f"the token in $HF_TOKEN may not write to {REPO} (403): make one that may, or choose a name of your own"
    assert done.returncode == 2 and done.stderr == f"error: {line}\n" and TOKEN not in done.stdout


def test_a_dead_endpoint_is_one_line(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", dead := f"http://127.0.0.1:{tiny.free_port()}")
    with pytest.raises(ConfigError) as raised:
        pushed(monkeypatch, checkpoint, REPO)
    said = str(raised.value)
    assert said.startswith(f"could not upload to {REPO} at {dead} (") and "$HF_ENDPOINT" in said and "\n" not in said


def test_the_token_comes_from_the_environment_alone(hub, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_of_a_file")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for value in (None, " \n", f"{TOKEN}\n{TOKEN}", f"{TOKEN}\u2026"):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if value:
            monkeypatch.setenv("HF_TOKEN", value)
        with pytest.raises(ConfigError, match=r"^no token in \$HF_TOKEN: make one that may write") as raised:
            pushed(monkeypatch, checkpoint, REPO)
        assert TOKEN not in str(raised.value)
    assert not hub.requests


def test_what_is_no_checkpoint_or_no_name_is_told(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    for place in ("owner/name", tmp_path / "elsewhere", tmp_path / "runs" / "tiny", checkpoint.with_name("000009")):
        with pytest.raises(ConfigError, match=f"^{place} is not a checkpoint of a run: say runs/NAME/"):
            pushed(monkeypatch, place, REPO, "--dry-run")
    for name in ("name", "a/b/c", "owner/", "owner/a b", "owner/a--b", "../name", "https://huggingface.co/owner/name"):
        with pytest.raises(ConfigError, match="is no name on the hub: say OWNER/NAME"):
            pushed(monkeypatch, checkpoint, name, "--dry-run")


def test_it_needs_no_torch():
    script = "import sys; from tools import push; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
