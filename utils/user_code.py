"""A Python file of the user's: it runs as in a program of its own, and changes nothing of this one."""

import contextlib
import importlib.util
import os
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
# folders whose modules may have the names of a user's: ours, and those of all users' files so far
FOLDERS = {ROOT, ROOT / "benchmarks", ROOT / "tests"}
CUDNN, CUDNN_SETTINGS = torch.backends.cudnn, ("benchmark", "deterministic", "allow_tf32")


def random_states() -> list:
    """Of Python, NumPy and torch, on all devices in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), devices]


def set_random_states(states: list) -> None:
    """What random_states returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])


SETTINGS = (  # of the whole process, (read, write): every file has its own
    (lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
    (os.getcwd, os.chdir),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    # a default device "cpu" would be a mode of its own
    (
        torch.get_default_device,
        lambda value: torch.set_default_device(None if value.type == "cpu" else value),
    ),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    *((partial(getattr, CUDNN, name), partial(setattr, CUDNN, name)) for name in CUDNN_SETTINGS),
)


def home(module) -> Path | None:
    """The folder from which a top-level module is imported."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    file = Path(file)
    return file.parent.parent if file.name == "__init__.py" else file.parent


class UserModule:
    """A Python file, imported once under its own name.

    While its code runs, in `with user_module.running():`, its folder is the first in sys.path, modules beside
    it go before ours of the same name, and the SETTINGS are its own. Before and after, all that is ours.
    """

    def __init__(self, file: str):
        """Import the file. Whatever it raises is passed on."""
        self.path = Path(file).resolve()
        self.folder, self.name = self.path.parent, self.path.stem
        neighbours = (*self.folder.glob("*.py"), *self.folder.glob("*/__init__.py"))
        self.names = {self.name} | {p.stem if p.stem != "__init__" else p.parent.name for p in neighbours}
        self.modules = {}  # of this file and its folder, which others of the same name replace meanwhile
        with torch.enable_grad():  # as in a new program
            self.settings = [read() for read, _ in SETTINGS]
        self.settings[0] = [str(self.folder), *self.settings[0]]
        FOLDERS.add(self.folder)
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        module = self.modules[self.name] = importlib.util.module_from_spec(spec)
        self.module = module
        try:
            with self.running():
                spec.loader.exec_module(module)
        except BaseException:
            if sys.modules.get(self.name) is module:  # as an import that fails
                del sys.modules[self.name]
            raise

    def replaced(self) -> list[str]:
        """The names of loaded modules of other folders that this file must not see."""
        others = FOLDERS - {self.folder}
        names = {n for n in self.names & sys.modules.keys() if home(sys.modules[n]) in others}
        if sys.modules.get(self.name, self.modules.get(self.name)) is not self.module:
            names.add(self.name)
        return [n for n in sys.modules if n.partition(".")[0] in names]

    @contextlib.contextmanager
    def running(self, seed: int | None = None):
        """Inside, the process is as this file left it; the random states start at `seed`, if it is given."""
        ours = [read() for read, _ in SETTINGS]
        states = random_states()
        hidden = {name: sys.modules.pop(name) for name in self.replaced()}
        sys.modules |= self.modules
        for value, current, (_, write) in zip(self.settings, ours, SETTINGS):
            if value != current:
                write(value)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            self.settings = [read() for read, _ in SETTINGS]
            for value, current, (_, write) in zip(ours, self.settings, SETTINGS):
                if value != current:
                    write(value)
            set_random_states(states)
            tops = {name.partition(".")[0] for name in hidden}
            self.modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in tops}
            for name in self.modules:
                del sys.modules[name]
            sys.modules |= hidden
