# In Colab: fetches the course and installs what is missing there. Elsewhere: says so if the kernel is a wrong one.
import os
import subprocess
import sys
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab") and not os.path.isfile("../medctkit/course/colab.py"):
    if not os.path.isdir("medctkit-course"):
        address = os.environ.get("MEDCTKIT_REPOSITORY", "https://github.com/medctkit/medctkit")
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "medctkit-course"], check=True)
    sys.path.insert(0, os.path.abspath("medctkit-course"))
    from medctkit.course import colab

    colab.install()
    os.chdir("medctkit-course/notebooks")
elif not find_spec("medctkit"):
    raise ModuleNotFoundError(
        f"this kernel is {sys.executable}, which has no medctkit. Choose the Python in which you ran `make setup` "
        "under Kernel, Change Kernel; or run `make setup` with this one active."
    )
