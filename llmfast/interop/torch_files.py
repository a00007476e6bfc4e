"""What ``torch.save`` wrote, without running what is inside: tensors, numbers, text, lists and dictionaries only."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from llmfast.errors import UserError

MOST_PICKLE = 64 << 20  # bytes of pickle, beside the tensors' own
_ALLOWED = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char")),
    *(f"torch {kind}Storage" for kind in ("Byte", "Bool")),
    *(f"torch {kind}" for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}
_IN_ZIP = "data.pkl"


def read_torch(path: Path) -> tuple[Any, bool]:
    """(the object in a file of ``torch.save``, whether its tensors are views of the mapped file).

    Nothing but tensors and plain values is built: a file that asks for anything else is refused by name before it is
    loaded. Raises ``UserError`` for such files and for damaged ones.
    """
    try:
        if mapped := zipfile.is_zipfile(path):
            _check_zip(path)
        else:  # before PyTorch 1.6
            with path.open("rb") as file:
                for _ in range(5):  # magic number, protocol, system, the object, names of its storages
                    _check_pickle(path, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that there are not, in damaged files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), mapped
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} is damaged: it asks for more memory than there is") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[-1][:200]
        raise UserError(f"{path} is not loaded, for it holds more than tensors and plain values: {reason}") from None
    except Exception as error:  # whatever torch, zipfile and pickle make of damaged bytes
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason})") from None


def _check_zip(path: Path) -> None:
    """Refuse archives that torch.save does not write: compressed ones can be far larger than their file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == _IN_ZIP]
        if len(pickles) != 1 or len(names) != len(entries):
            raise UserError(f"{path} is a zip archive, but none that torch.save wrote")
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
            if not stored or entry.header_offset + entry.file_size > size:
                raise UserError(f"{path} is damaged: {entry.filename} does not lie whole in it")
        if sum(entry.file_size for entry in entries) > size:
            raise UserError(f"{path} is damaged: its entries overlap")
        if pickles[0].file_size > MOST_PICKLE:
            raise UserError(f"{path} is no model: its pickle has {pickles[0].file_size:,} bytes")
        with archive.open(pickles[0]) as file:
            _check_pickle(path, file)


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    """Read one pickle's instructions, without obeying them, for the names that it would import."""
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name == "GLOBAL" and argument not in _ALLOWED:
            name = str(argument).replace(" ", ".")
            raise UserError(
                f"{path} is not loaded: it asks for {name}, and llmfast loads only tensors and plain values; save it "
                "again as a state_dict"
            )
        if instruction.name in ("INST", "OBJ", "STACK_GLOBAL", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise UserError(f"{path} is not loaded: it holds a pickled object ({instruction.name}), not only tensors")
