// The byte-pair-encoding trainer of the module `_C`.
#pragma once

#include <pybind11/pybind11.h>

void register_bpe(pybind11::module_& module);
