"""Packaging of prolong_jax; build and tool tables stand in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The literal assigned to `__version__` in prolong_jax/__init__.py, without importing it."""
    tree = ast.parse((ROOT / "prolong_jax" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("prolong_jax/__init__.py must assign a literal string to __version__")


# Lower bounds: the oldest versions with which the test suite was run (Python 3.11, all at their
# bounds at once). JAX is capped at the newest minor release that was run. math-verify and
# reasoning-gym are held to one minor release, since their behaviour is the reward.
REQUIREMENTS = [
    "flax>=0.12.7",
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3.5",
    "jinja2>=3.1",  # chat templates
    "langdetect>=1.0.9",
    "math-verify[antlr4-13-2]>=0.9,<0.10",
    "ml-collections>=1.1",
    "numpy>=2.1",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pint>=0.24.4",
    "pyarrow>=21.0",
    "reasoning-gym>=0.1.25,<0.2",
    "rich>=14.0",
    "safetensors>=0.6.2",
    "sentencepiece>=0.2.1",
    "sympy>=1.13.3",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.22.1",
    "transformers>=5.0",
    "wandb>=0.23",
]

EXTRAS = {
    "cuda12": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    # Compilers for compile_check, on a machine without the accelerator.
    "tpu-compile": ["jax[tpu]"],
    "cuda-compile": [
        "jax[cuda12-local]",
        "nvidia-cuda-nvcc-cu12>=12.6",
        "nvidia-cudnn-cu12>=9.8,<10",
    ],
    # torch is left out for its size; the tests that compare with it skip where it is missing.
    "dev": [
        "beartype>=0.22.2",
        # The notebooks are executed by a test. `notebooks` below is for people.
        "ipykernel>=7.1",
        "matplotlib>=3.10",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "pyright>=1.1.414",
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        "ruff>=0.17.6",
        "setuptools>=77",  # the packaging test builds a wheel without a network
        "tensorboardX>=2.6.5",
    ],
    "tensorboard": ["tensorboardX>=2.6.5"],
    "notebooks": ["jupyter>=1.1", "matplotlib>=3.10"],
}

setup(
    name="prolong-jax",
    version=read_version(),
    description="Prolonged reinforcement learning with verifiable rewards (ProRL) in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["prolong_jax", "prolong_jax.*"]),
    package_data={"prolong_jax": ["assets/**"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
