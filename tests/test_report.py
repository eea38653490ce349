"""tools/report.py: its numbers are the evaluation's, it stays small, says what is missing, runs nothing models wrote.

The page itself is tried in headless Chromium, where there is one: chromium, chromedriver and selenium.
"""

import base64
import gzip
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from tools import report, svg

ROOT = report.TEMPLATE.parent.parent
NASTY = [
    "<script>window.hacked = 1; document.title = 'hacked'</script>",
    '<img src=x onerror="window.hacked = 2">',
    "</script><script>window.hacked = 3; alert(3)</script>",
    '<a href="javascript:window.hacked=4" onclick="window.hacked=4">javascript:alert(4)</a>',
    "<!-- <script> ]]> --!> </style></textarea></title><style>* { display: none }</style>",
    '"\' onmouseover="window.hacked = 5" \'><svg onload=window.hacked=6>',
    "{{TITLE}} {{CHUNKS}} ${window.hacked = 7} `\\u003cscript\\u003e` &lt;b&gt; &#0;",
    "line\u2028line\u2029 nul \x00 bell \x07 escape \x1b[31m carriage\rreturn \x7f",
    "half a pair \ud83d and \udc00, turned \u202eround\u202c, \ufeff \uffff",
    "very long " + "<b>x</b>" * 10_000,
]
RATE = {"success": 0.525, "n": 600, "games": 200, "low": 0.45897, "high": 0.59016}
RESULT = RATE | {
    "types": {"look_at": RATE | {"success": 0.1}, "pick": RATE | {"success": 0.95, "low": 0.9, "high": 0.97}},
    "mean_steps": 7.68,
    "invalid": 0.0002,
    "unavailable": 0.133,
    "repeats": 0.1464,
}


def step(number: int, **other) -> dict:
    fields = {"observation": f"room {number}", "action": "look", "thought": "hm", "tag": "think", "valid": True}
    fields |= {
        "available": True,
        "truncated": False,
        "reward": 0.0,
        "advantage": -0.5,
        "label": None,
        "label_source": "",
    }
    fields |= other
    reply = f"<{fields['tag']}>{fields['thought']}</{fields['tag']}><action>{fields['action']}</action>"
    return {"response": reply} | fields


def episode(group: int, member: int, steps: list, kind: str = "pick") -> dict:
    task = {"env": "alfworld", "type": kind, "id": f"{kind}-{group}", "split": "train"}
    return {"task": task, "group": group, "member": member, "steps": steps, "won": member == 0, "score": 1.0}


def write_run(
    folder, iterations=3, episodes=None, guidelines=(), config=None, results=None, metrics=None, questions=()
):
    """Write a run's folder; return it."""
    (folder / "episodes").mkdir(parents=True)
    config = {"name": "run", "seed": 0, "algo": {"advantage": "gigpo"}, "judge": {"enabled": True}} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "iteration": i,
            "rollout/success": 0.1 * i,
            "judge/balanced_accuracy": 0.5,
            "time/total": 9.0,
            "time/judge": 1.0,
        }
        | (metrics or {})
        for i in range(iterations)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval_000003.json").write_text(json.dumps({"levels": results or {"L0": RESULT}}))
    (folder / "machine.json").write_text(json.dumps({"torch": "2.1", "GPUs": "8 x H100"}))
    episodes = episodes or [episode(group, member, [step(0), step(1)]) for group in (0, 1) for member in (0, 1)]
    for i in range(iterations):
        end = {"questions": list(questions), "guidelines": list(guidelines)}
        text = "".join(json.dumps(line) + "\n" for line in [*episodes, end])
        (folder / "episodes" / f"{i:06d}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def page_of(*folders, limit=5_000_000) -> str:
    page = report.build([report.read_run(folder) for folder in folders], limit)
    page.encode()  # nothing in it that UTF-8 cannot hold
    return page


def unpack(page: str, run: int, iteration: int) -> dict:
    data = re.search(rf'id="chunk-{run}-{iteration}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(data)))


def notes(page: str) -> str:
    return "".join(re.findall(r'<ul class="notes">.*?</ul>', page, re.DOTALL))


# ----------------------------------------------------------------------------------------------------------------------
# Without a browser


def test_numbers_are_those_of_eval_json(tmp_path):
    start = RESULT | {"success": 0.3, "low": 0.25, "high": 0.352}
    before = write_run(tmp_path / "runs" / "cold", results={"L0": start})
    where = {"model": {"path": "runs/cold/checkpoints/latest"}}  # relative to where runs/ is, as configs say it
    after = write_run(tmp_path / "runs" / "hot", config=where)
    page = page_of(after)
    cells = re.findall(r"<b>([\d.]+)\*?</b> <small>\[([\d.]+), ([\d.]+)\]</small>", page)
    kinds = [("10.0", "45.9", "59.0")] * 2 + [("95.0", "90.0", "97.0")] * 2
    assert cells == [("30.0", "25.0", "35.2"), ("52.5", "45.9", "59.0"), *kinds]
    assert '<span class="firm" title="the intervals are disjoint">+22.5</span>' in page
    assert "n=600 · 200 games" in page and "[45.9, 59.0], +22.5" in page
    assert "nothing to compare with" not in page and "cold</th>" in page
    both = page_of(after, before)  # the cold start is one of the runs: it is shown once
    assert len(re.findall(r"</span>cold</th>", both.split('id="learning"')[0].split('id="success"')[1])) == 4  # 3 + 1


def test_several_runs_share_each_figure(tmp_path):
    folders = [write_run(tmp_path / name, iterations=count) for name, count in (("one", 3), ("other", 5))]
    page = page_of(*folders)
    figure = json.loads(
        re.search(r'aria-label="Success in training" data-points="([^"]*)"', page)[1].replace("&quot;", '"')
    )
    assert [name for name, _, _ in figure["series"]] == ["one", "other"] and figure["at"] == [0, 1, 2, 3, 4]
    assert figure["series"][0][2] == ["0 %", "10 %", "20 %", None, None]
    assert "What differs" in page and page.count("<dd>8 x H100</dd>") == 2
    index = json.loads(re.search(r'id="index">(.*?)</script>', page)[1])
    assert [(run["name"], run["iterations"]) for run in index] == [("one", [0, 1, 2]), ("other", [0, 1, 2, 3, 4])]


@pytest.mark.parametrize(
    "lost, said",
    [
        ("config.yaml", "no config.yaml"),
        ("metrics.jsonl", "no metrics.jsonl"),
        ("eval_000003.json", "no eval_*.json"),
        ("machine.json", "no machine.json"),
        ("episodes", "no episodes/"),
    ],
)
def test_what_is_missing_is_named(tmp_path, lost, said):
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / lost) if lost == "episodes" else (folder / lost).unlink()
    assert said in notes(page_of(folder))


def test_an_empty_folder_and_broken_files(tmp_path):
    assert len(re.findall("<li>", notes(page_of(tmp_path)))) == 5
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_bytes(b"a: [1\n\xff\x00")
    (folder / "eval_000003.json").write_text('{"levels": {"L0": {"success": 0.5}, "L1": [')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"iteration": 2, "x": NaN, "y": 1e999, "z": {"deep": 1}}\n' + b"[" * 100_000 + b'\n{"iteration": 3, "rol'
        )
    with gzip.open(folder / "episodes" / "000001.jsonl.gz", "ab") as file:
        file.write(
            b'{"steps": 3}\n{"steps": [4, {"observation": "caf\xe9", "label": "x", "advantage": NaN}]}\n{"task": {"ty'
        )
    page = page_of(folder)
    said = notes(page)
    assert "config.yaml cannot be read" in said and "eval_000003.json cannot be read" in said
    assert "metrics.jsonl: 2 of 6 lines could not be read" in said
    assert "episodes/: 3 lines or steps could not be read" in said
    data = unpack(page, 0, 1)
    assert "caf\ufffd" in data["strings"] and len(data["episodes"]) == 5
    (folder / "metrics.jsonl").write_text("")
    assert "metrics.jsonl is empty" in notes(page_of(folder))


def test_size_is_kept_by_showing_fewer_iterations(tmp_path):
    rng = random.Random(0)
    said = [
        [episode(g, m, [step(0, thought=rng.randbytes(2000).hex())]) for g in range(4) for m in (0, 1)]
        for _ in range(30)
    ]
    folder = write_run(tmp_path / "run", iterations=30)
    for number, episodes in enumerate(said):
        text = "".join(json.dumps(line) + "\n" for line in episodes)
        (folder / "episodes" / f"{number:06d}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    whole = page_of(folder)
    base = len(page_of(folder, limit=0).encode())
    assert len(whole) - base > 400_000 and "for its size" not in whole
    limit = base + 150_000
    page = page_of(folder, limit=limit)
    (index,) = json.loads(re.search(r'id="index">(.*?)</script>', page)[1])
    assert len(page.encode()) <= limit and index["total"] == 30
    assert 4 <= len(index["iterations"]) < 30 and {0, 29} <= set(index["iterations"])
    assert f"episodes of {len(index['iterations'])} of 30 iterations are in this page" in notes(page)
    small = page_of(folder, limit=base + 35_000)  # less than one iteration: some of its tasks
    (index,) = json.loads(re.search(r'id="index">(.*?)</script>', small)[1])
    assert len(small.encode()) <= base + 35_000 and (index["iterations"], index["groups"]) == ([29], 2)
    assert {one[0] for one in unpack(small, 0, 29)["episodes"]} == {0, 1}


def test_guidelines_are_those_that_the_run_recorded(tmp_path):
    folder = write_run(tmp_path / "run", guidelines=["be quick", "</script>"])
    data = unpack(page_of(folder), 0, 1)
    assert [data["strings"][i] for i in data["guidelines"]] == ["be quick", "</script>"]
    (folder / "episodes" / "000001.jsonl.gz").write_bytes(
        gzip.compress((json.dumps(episode(0, 0, [step(0)])) + "\n").encode())
    )
    assert unpack(page_of(folder), 0, 1)["guidelines"] is None


class Tags(HTMLParser):
    """What a reader of HTML would find: elements, and attributes that run or lead somewhere."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs


def nasty_run(folder):
    """Everything that can be told to a report, told by an enemy."""
    first = [
        step(n, observation=s, thought=s, action=s, tag=s, label=n % 2, label_source=s) for n, s in enumerate(NASTY)
    ]
    first.append(step(99, observation=[[["deep"]]], prompt=NASTY[0], thought=7, action=None))
    answers = [f"<think>x</think><answer>{n % 2}</answer><advise>{s}</advise>" for n, s in enumerate(NASTY)]
    questions = [{"group": 0, "member": 0, "step": 0, "label": 1, "source": NASTY[0], "answers": [*answers, 5]}, "no"]
    episodes = [episode(g, m, first, NASTY[1]) for g in (0, 1) for m in (0, 1)]
    config = {"model": {"path": NASTY[2]}, NASTY[1]: {NASTY[0]: NASTY[5]}, "env": {"name": NASTY[8]}}
    results = {NASTY[0]: RESULT | {"types": {NASTY[1]: RATE}, "trained_on": [NASTY[2]]}}
    write_run(folder, 2, episodes, NASTY, config, results, {name: 0.5 for name in NASTY[:9]}, questions)
    (folder / "machine.json").write_text(json.dumps({said: said for said in NASTY} | {"a": [{"b": NASTY[0]}]}))
    with gzip.open(folder / "episodes" / "000001.jsonl.gz", "ab") as file:
        file.write(
            b"[" * 200_000 + b"\n" + b'{"steps": [{"observation": "\xff\xfe<script>window.hacked = 8</script>"}]}\n{"to'
        )
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 1, "<img src=x onerror=window.hacked=9>": 1, "time/\xff<b>": 2}\n{"iter')
    return folder


def test_nothing_untrusted_becomes_markup(tmp_path):
    clean = Tags(page_of(write_run(tmp_path / "clean", 2)))
    page = page_of(nasty_run(tmp_path / "<img src=x onerror=window.hacked=10>"))
    tags = Tags(page)
    for tag in ("script", "style", "a", "img", "title", "b", "meta"):
        own = tags.found.count(tag) - clean.found.count(tag)
        assert own == (page.count("<b>") - page_of(tmp_path / "clean").count("<b>") if tag == "b" else 0), tag
    names = {name for name, _ in tags.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc", "action")]
    assert all(value.startswith("#") for name, value in tags.attributes if name == "href")
    assert "\x00" not in page and not re.search("[\ud800-\udfff]", page)
    data = unpack(page, 0, 1)
    for said in NASTY:
        assert report.as_text(said) in data["strings"]
    assert "\ufffd\ufffd<script>window.hacked = 8</script>" in data["strings"]


def test_only_the_templates_own_script_and_style_are_allowed(tmp_path):
    page = page_of(nasty_run(tmp_path / "run"))
    (rules,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert rules.startswith("default-src 'none'; ") and "unsafe" not in rules and "http" not in rules
    for kind in ("script", "style"):
        (body,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in rules
        for means in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http:", "https:", "url("):
            assert means not in body


def test_ticks_and_places():
    assert svg.ticks(0.1, 0.52) == [0.0, 0.2, 0.4, 0.6] and svg.ticks(5.0, 5.0)[0] <= 5.0 <= svg.ticks(5.0, 5.0)[-1]
    assert svg.ticks(-3e-7, 4e-7)[0] <= -3e-7 and svg.ticks(-3e-7, 4e-7)[-1] >= 4e-7
    assert svg.evenly(10, 4) == [0, 3, 6, 9] and svg.evenly(3, 3) == [0, 1, 2] and svg.evenly(5, 1) == [4]
    assert svg.chart("one", [("a", "c0", {3: 0.0})]) and svg.stack("none", [("a", "c0", {3: 0.0})], "number") == ""


def test_the_command_line_needs_no_torch_and_runs_from_any_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    script = f"import sys; sys.argv = ['report.py', {str(folder)!r}]; from tools import report; report.main(); "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and (folder / "report.html").stat().st_size < 200_000
    (folder / "report.html").unlink()
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    subprocess.run([*command, "run"], cwd=tmp_path, capture_output=True, check=True)
    assert (folder / "report.html").is_file()
    absent = subprocess.run([*command, "runs/absent"], cwd=tmp_path, capture_output=True, text=True)
    assert absent.returncode == 2 and absent.stderr == "error: runs/absent is not a folder of a run\n"


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

LACKING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
LACKING += [] if importlib.util.find_spec("selenium") else ["selenium"]
in_browser = pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def visit(browser, path, place=""):
    """Open a page and wait until its first step is shown."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")
    browser.get(path.as_uri() + place)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))


def units(browser, selector: str) -> list[str]:
    """The exact texts of elements, halves of surrogate pairs and all."""
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => [...Array(e.textContent.length).keys()]"
    found = browser.execute_script(script + ".map((i) => e.textContent.charCodeAt(i)))", selector)
    return [b"".join(unit.to_bytes(2, "little") for unit in one).decode("utf-16-le", "surrogatepass") for one in found]


def keys(browser, *names: str) -> str:
    """Press keys one by one; where one is then, without the run's name."""
    from selenium.webdriver.common.action_chains import ActionChains

    for name in names:
        before = browser.execute_script("return location.hash")
        ActionChains(browser).send_keys(name).perform()
        for _ in range(100):
            if browser.execute_script("return location.hash") != before:
                break
    return browser.execute_script("return location.hash").partition("&")[2]


@in_browser
def test_nothing_untrusted_runs_and_all_of_it_is_shown(tmp_path, browser):
    from selenium.common.exceptions import NoAlertPresentException

    path = tmp_path / "page.html"
    path.write_text(page_of(nasty_run(tmp_path / "run")), encoding="utf-8")
    for number, said in enumerate(NASTY):
        visit(browser, path, f"#iteration=1&task=1&attempt=1&step={number + 1}")
        for part in ("observation", "thought", "action"):
            assert units(browser, f".{part} .said") == [report.as_text(said)]
        assert units(browser, ".guidelines > ul > li") == [report.as_text(said) for said in NASTY]
    visit(browser, path, "#iteration=1&task=0&attempt=0&step=1")
    answers = {f"<think>x</think><answer>{n % 2}</answer><advise>{s}</advise>" for n, s in enumerate(NASTY)}
    assert {report.as_text(said) for said in answers} <= set(units(browser, ".critique .raw"))
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.execute_script("for (const one of document.querySelectorAll('button, summary')) one.click()")
    shown = browser.execute_script("return [document.title, window.hacked ?? null, document.images.length]")
    assert shown == ["run – report", None, 0]
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert  # noqa: B018
    assert browser.get_log("browser") == []
    inject = (
        "const s = document.createElement('script'); s.textContent = 'window.injected = 1'; document.body.append(s)"
    )
    assert browser.execute_script(f"{inject}; return window.injected ?? null") is None  # the policy holds
    (refused,) = browser.get_log("browser")
    assert "violates the following Content Security Policy" in refused["message"]


@in_browser
def test_keys_and_links_lead_to_steps(tmp_path, browser):
    path = tmp_path / "page.html"
    kinds = ("first", "second", "third")
    episodes = [episode(g, m, [step(n) for n in range(3 + m)], kinds[g]) for g in range(3) for m in range(2)]
    folders = [write_run(tmp_path / name, 3, episodes) for name in ("one", "other")]
    path.write_text(page_of(*folders), encoding="utf-8")
    visit(browser, path, "#run=other&iteration=1&task=1&attempt=0&step=2")
    assert units(browser, ".observation .said") == ["room 1"]
    chosen = (
        "return ['run', 'iteration', 'task'].map((n) => document.getElementById('pick-' + n).selectedOptions[0].text)"
    )
    assert browser.execute_script(chosen) == ["other", "1", "1 · second · 1/2 won"]
    right, left, down, up, home, end = "\ue014", "\ue012", "\ue015", "\ue013", "\ue011", "\ue010"
    assert keys(browser, right) == "iteration=1&task=1&attempt=0&step=3"
    assert keys(browser, right) == "iteration=1&task=1&attempt=0&step=3"  # the last one
    assert keys(browser, down, right) == "iteration=1&task=1&attempt=1&step=4"
    assert keys(browser, up) == "iteration=1&task=1&attempt=0&step=3"  # a shorter attempt
    assert keys(browser, home) == "iteration=1&task=1&attempt=0&step=1"
    assert keys(browser, end, left) == "iteration=1&task=1&attempt=0&step=2"
    assert keys(browser, "]", "j", "[", "[") == "iteration=0&task=2&attempt=0&step=1"
    assert keys(browser, "k") == "iteration=0&task=1&attempt=0&step=1"
    assert units(browser, ".steps .on .what") == ["look"] and units(browser, "#map .cell.on") == [""]
    visit(browser, path)
    assert "run=" not in browser.execute_script("return location.hash")
    browser.execute_script("scrollTo(0, 0)")
    assert keys(browser, down) == ""  # far from the episodes, arrows scroll
    visit(browser, path, "#run=none&iteration=x&task=-1&attempt=99&step=99999")  # a stale link leads to what there is
    assert units(browser, ".observation .said") == ["room 2"]
    assert browser.get_log("browser") == []


@in_browser
def test_it_fits_a_phone_and_says_what_it_lacks(tmp_path, browser):
    path = tmp_path / "page.html"
    path.write_text(page_of(nasty_run(tmp_path / "run")), encoding="utf-8")
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(browser, path)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    path.write_text(page_of(tmp_path), encoding="utf-8")  # a folder without any file of a run
    visit(browser, path)
    assert "no episodes" in units(browser, "#status")[0].lower() and browser.get_log("browser") == []


@in_browser
def test_long_attempts_stay_beside_the_step(tmp_path, browser):
    path = tmp_path / "page.html"
    path.write_text(page_of(write_run(tmp_path / "run", 1, [episode(0, 0, [step(n) for n in range(50)])])))
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(browser, path)
        side = "return document.querySelector(arguments[0]).getBoundingClientRect()[arguments[1]]"
        ends, starts = browser.execute_script(side, ".first", "right"), browser.execute_script(side, ".second", "left")
        assert 0 < ends < starts
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
