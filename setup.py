"A wheel carries what `so8t init` copies; an editable install finds it in the checkout."

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class WithWorkspace(build_py):
    "The library, and beside it settings.ini, pipelines and stage notebooks."

    def run(self):
        super().run()
        carried = [HERE / "settings.ini", *HERE.glob("configs/*.yaml"), *HERE.glob("nbs/stages/*.ipynb")]
        for file in [] if self.editable_mode else carried:
            to = Path(self.build_lib, "so8t", "assets", "workspace", file.relative_to(HERE))
            self.mkpath(str(to.parent))
            self.copy_file(str(file), str(to))


setup(cmdclass={"build_py": WithWorkspace})
