"""A tensor over memory that torch did not allocate, through DLPack."""

from __future__ import annotations

import ctypes

import torch
from torch.utils.dlpack import from_dlpack

# DLPack 0.x, as torch reads it: dlpack.h of https://github.com/dmlc/dlpack
_CPU, _CUDA = 1, 2
_UINT = 1
_CAPSULE = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: contiguous
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # null: torch frees nothing
    ]


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)

# torch looks into the description when the last view dies, which may be as late as the interpreter's end, where a
# deleter written in Python could not run. So descriptions (about 100 bytes each) are kept, and there is no deleter.
_descriptions: list[_ManagedTensor] = []


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """[nbytes] uint8 over memory of the CPU or of a CUDA device; `view(dtype)` makes it any other dtype.

    Unlike `__cuda_array_interface__`, which asks the driver whose memory it is, this works for addresses where nothing
    is mapped yet. The memory stays the caller's: it must outlive every view that is used.
    """
    kind = _CUDA if device.type == "cuda" else _CPU
    description = _ManagedTensor(
        _Tensor(
            data=address,
            device=_Device(kind, device.index or 0),
            ndim=1,
            dtype=_DataType(_UINT, 8, 1),
            shape=(ctypes.c_int64 * 1)(nbytes),
        )
    )
    _descriptions.append(description)
    return from_dlpack(_new_capsule(ctypes.addressof(description), _CAPSULE, None))
