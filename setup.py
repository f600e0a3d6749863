"""Packaging: ``distilspeed/`` holds a link to each top-level folder, which makes them one package.

No folder is importable under its bare name: a top-level module ``kernels`` would shadow the PyPI package of that name,
which transformers imports if it is installed.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "distilspeed" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="distilspeed",
    version=re.findall(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[0],
    description="Knowledge distillation of BERT, RoBERTa, ModernBERT and GPT-2 on DeepSpeed, with fused losses",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # Follows the links, so that launch/ and ds_configs/ are part of the package; the quickstart's model is not.
    packages=find_namespace_packages(
        include=["distilspeed", "distilspeed.*"], exclude=["distilspeed.launch.quickstart*"]
    ),
    package_data={"": ["*.cpp", "*.h", "*.json", "*.sh", "*.sbatch", "py.typed"]},
    entry_points={"console_scripts": ["distilspeed=distilspeed.launch.command:main"]},
    python_requires=">=3.11",
    # For the losses; the extra "train" adds the trainer's dependencies.
    install_requires=["filelock", "torch>=2.10", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": [
            "deepspeed>=0.19.8",
            "transformers>=5.17,<6",
            "datasets>=4.0",
            "huggingface-hub",
            "packaging",
            "psutil",
            "pydantic>=2",
            "tokenizers",
            "safetensors",
            "numpy>=1.26",
            "pyarrow",
            "matplotlib",
            "scikit-learn",
            "scipy",
            "torchmetrics",
            "seqeval",
            "tqdm",
        ],
        "test": [
            "distilspeed[train]",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "tensorboard",
            "lightning>=2.2",
            "accelerate>=1.1",
            "setuptools>=77",
        ],
        "bench": ["liger-kernel"],
        "monitors": ["tensorboard", "wandb"],
    },
)
