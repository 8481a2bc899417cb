// library.h: under which name the ops are registered. tests/ptxsim compiles the CUDA side a second time under another name and
// for CPU tensors, with kernels that run in a simulator; nothing else sets these.
#pragma once

#ifndef RK_LIBRARY
#define RK_LIBRARY rerank_kernels
#endif
