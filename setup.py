"Packaging, read from settings.ini so that every name and version is written once."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
links = {"Source": cfg["git_url"], "Documentation": cfg["doc_host"]}  # none until there is an address
minors = range(int(cfg["min_python"].split(".")[1]), 14)
classifiers = [
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Framework :: Jupyter",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    *(f"Programming Language :: Python :: 3.{minor}" for minor in minors),
]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    classifiers=classifiers,
    project_urls={name: address for name, address in links.items() if address},
    python_requires=">=" + cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "dev": shlex.split(cfg["dev_requirements"]),
        "site": shlex.split(cfg["site_requirements"]),
        "vllm": shlex.split(cfg["vllm_requirements"]),
    },
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "vllm.general_plugins": shlex.split(cfg["vllm_plugins"]),
    },
    packages=find_packages(include=["moe_nb", "moe_nb.*"]),
    package_data={"moe_nb": ["tiny_model/*", "tiny_upcycled_model/*", "tasks/*"]},
    include_package_data=False,
    zip_safe=False,
)
