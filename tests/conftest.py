"""Set-up of the test session, before any test module imports jax."""

import os
import shutil
import tempfile

import pytest

# Shapes and dtypes of these pure modules are checked on every call. The others are left alone:
# their checks would be traced into every compiled program.
PURE = ("masked", "sequences", "losses", "objectives", "advantages", "shaping")
# Files that measure programs, run many steps, or compare with other processes.
OPTIMISED = (
    "train_test.py",
    "learning_test.py",
    "compile_check_test.py",
    "roofline_test.py",
    "processes_test.py",
)
SHAPE_CHECKED = [f"prolong_jax.{name}" for name in PURE]


def pytest_configure(config):
    """Eight virtual CPU devices and no network, unless the caller has set otherwise.

    Runs that a test starts in processes of their own compile the same programs: they share a cache.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="prolong-jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

    from jaxtyping import install_import_hook

    install_import_hook(SHAPE_CHECKED, "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def compile_cheaply(request):
    """Most tests spend their time on compiling, so they compile without optimisation."""
    import jax

    cheaply = request.path.name not in OPTIMISED
    if cheaply != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()  # programs of other files, which would be taken as they are
        jax.config.update("jax_disable_most_optimizations", cheaply)


def pytest_collection_modifyitems(items):
    """The longest files come first, so that both workers end at about the same time."""
    long = ["train_test.py", "update_test.py", "notebooks_test.py", "learning_test.py"]
    long += ["processes_test.py"]
    items.sort(key=lambda i: long.index(i.path.name) if i.path.name in long else len(long))
