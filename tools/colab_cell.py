# In Colab: fetches the course and installs what is missing there. Elsewhere: does nothing.
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
