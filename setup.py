"""Packaging: the top-level folders become one namespace, ``distilspeed``.

A top-level module called ``kernels`` would shadow the PyPI package of that name, which transformers
imports when it is installed; so nothing here is importable under its folder's bare name.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="distilspeed",
    version="0.1.0",
    description="Knowledge distillation of Transformer encoders on DeepSpeed, with fused Triton losses",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    package_dir={
        "distilspeed.kernels": "kernels",
        "distilspeed.kernels.profiling": "kernels/profiling",
        "distilspeed.trainer": "trainer",
        "distilspeed.trainer.throughput": "trainer/throughput",
    },
    packages=[
        "distilspeed.kernels",
        "distilspeed.kernels.profiling",
        "distilspeed.trainer",
        "distilspeed.trainer.throughput",
    ],
    package_data={"distilspeed.kernels": ["*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
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
        "tqdm",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "tensorboard",
            "lightning>=2.2",
            "accelerate>=1.1",
        ],
        "bench": ["liger-kernel"],
        "monitors": ["tensorboard", "wandb"],
    },
)
