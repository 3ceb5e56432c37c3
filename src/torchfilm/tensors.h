// Which tensors the kernels take, and how these lie in memory.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>

#include "kernels.h"

namespace torchfilm {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr int64_t kPerThread = 32768;  // features that are worth the start of a thread

// Whether a mode or a transform sees each operation here (vmap, fake tensors, tracers), so that none may be skipped.
inline bool watched() {
  const auto usual = DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  if (at::impl::PythonTorchFunctionTLS::stack_len() > 0) return true;
  return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual.raw_repr()) != 0;
}

// Whether these are float32 numbers in this process's memory, and nothing else.
inline bool plain(const Tensor& tensor) {
  const auto usual = DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU}) |
                     DispatchKeySet(DispatchKey::ADInplaceOrView);
  if ((tensor.key_set().raw_repr() & ~usual.raw_repr()) != 0 || tensor.scalar_type() != at::kFloat) return false;
  return !tensor._fw_grad(0).defined() && tensor.const_data_ptr() != nullptr;
}

// Of a modulation aligned with features [batch, ..., channels on `axis`, ...]: [C], [1 or B, C] with the channels
// last, or with one axis for each of the features'. From one row to the next, or nothing if it does not fit.
inline std::optional<int64_t> stride_of(const Tensor& modulation, const Tensor& x, int64_t axis) {
  const int64_t axes = modulation.dim(), channels = x.size(axis);
  const int64_t channel = axes == x.dim() ? axis : axes - 1;
  if (axes < 1 || (axes > 2 && axes != x.dim()) || modulation.size(channel) != channels) return std::nullopt;
  if (channels > 1 && modulation.stride(channel) != 1) return std::nullopt;
  if (axes == 1) return 0;
  for (int64_t i = 1; i < axes; ++i)
    if (i != channel && modulation.size(i) != 1) return std::nullopt;
  if (modulation.size(0) == 1) return 0;
  return modulation.size(0) == x.size(0) ? std::optional(modulation.stride(0)) : std::nullopt;
}

// How features lie in memory; nothing for memory of another order.
inline std::optional<Layout> layout_of(const Tensor& x, int64_t dim) {
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  if (axis < 1 || axis >= x.dim() || x.numel() == 0) return std::nullopt;
  Layout at{x.size(0), x.size(axis), x.numel() / (x.size(0) * x.size(axis)), {0, 0}, false};
  if (x.is_contiguous()) {
    at.in_columns = axis == x.dim() - 1 || at.others == 1;
    return axis == 1 || at.in_columns ? std::optional(at) : std::nullopt;
  }
  const auto last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  at.in_columns = axis == 1 && (x.dim() == 4 || x.dim() == 5) && x.is_contiguous(last);
  return at.in_columns ? std::optional(at) : std::nullopt;
}

// The same, with how gamma and beta lie beside them.
inline std::optional<Layout> layout_of(const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t dim) {
  auto at = layout_of(x, dim);
  if (!at || gamma.sizes() != beta.sizes()) return std::nullopt;
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  const auto of_gamma = stride_of(gamma, x, axis), of_beta = stride_of(beta, x, axis);
  if (!of_gamma || !of_beta) return std::nullopt;
  at->strides = {*of_gamma, *of_beta};
  return at;
}

inline int threads_for(const Tensor& x) {
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), 1 + x.numel() / kPerThread));
}

// How the features of a norm lie (kernels.h says what `number` is); nothing for what torch refuses too: groups of
// another size than the others, and of one number.
inline std::optional<Layout> layout_of_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t dim,
                                            int64_t number) {
  auto at = layout_of(x, gamma, beta, dim);
  if (!at || !x.is_contiguous()) return std::nullopt;
  at->in_columns = dim == -1;  // groups of channels with one position each lie in rows as well
  if (at->in_columns) return at;
  if (number < 1 || at->channels % number || at->channels / number * at->others == 1) return std::nullopt;
  return at;
}

inline float* written(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr; }

inline const float* read(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

}  // namespace torchfilm
