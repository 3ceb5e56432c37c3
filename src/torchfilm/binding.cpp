// The way from Python to kernels.cpp: which tensors they take, where these lie, and what comes back.
//
// Python's module is `torchfilm._kernels`. A function returns None for tensors that the kernels do not take: other
// devices and precisions, subclasses, gaps in memory, tensors that a transform or a mode of torch watches. Nothing
// here knows of gradients: onepass.py does. Sizes that do not fit are among what is not taken; functional.py
// explains them.

#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "kernels.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torchfilm::Layout;

constexpr int64_t kPerThread = 32768;  // features that are worth the start of a thread
constexpr int64_t kAlone = 65536;      // from here on other threads of Python go on meanwhile

// Whether a mode or a transform sees each operation here (vmap, fake tensors, tracers), so that none may be skipped.
bool watched() {
  const auto usual = DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  if (at::impl::PythonTorchFunctionTLS::stack_len() > 0) return true;
  return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual.raw_repr()) != 0;
}

// Whether products are taken in another precision here.
bool autocast() { return !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutocastCPU); }

// Whether these are float32 numbers in this process's memory, and nothing else.
bool plain(const Tensor& tensor) {
  const auto usual = DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU}) |
                     DispatchKeySet(DispatchKey::ADInplaceOrView);
  if ((tensor.key_set().raw_repr() & ~usual.raw_repr()) != 0 || tensor.scalar_type() != at::kFloat) return false;
  return !tensor._fw_grad(0).defined() && tensor.const_data_ptr() != nullptr;
}

// The tensor in a Python object, if the kernels take it; subclasses may mean something else by it.
const Tensor* taken(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return plain(tensor) ? &tensor : nullptr;
}

// A whole number, or any, in a Python object; nothing for something else, which torch itself then explains.
std::optional<int64_t> whole(PyObject* object) {
  const int64_t found = PyLong_AsLongLong(object);
  if (!PyErr_Occurred()) return found;
  PyErr_Clear();
  return std::nullopt;
}

std::optional<double> real(PyObject* object) {
  const double found = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return found;
  PyErr_Clear();
  return std::nullopt;
}

// Of a modulation aligned with features [batch, ..., channels on `axis`, ...]: [C], [1 or B, C] with the channels
// last, or with one axis for each of the features'. From one row to the next, or nothing if it does not fit.
std::optional<int64_t> stride_of(const Tensor& modulation, const Tensor& x, int64_t axis) {
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
std::optional<Layout> layout_of(const Tensor& x, int64_t dim) {
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
std::optional<Layout> layout_of(const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t dim) {
  auto at = layout_of(x, dim);
  if (!at || gamma.sizes() != beta.sizes()) return std::nullopt;
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  const auto of_gamma = stride_of(gamma, x, axis), of_beta = stride_of(beta, x, axis);
  if (!of_gamma || !of_beta) return std::nullopt;
  at->strides = {*of_gamma, *of_beta};
  return at;
}

int threads_for(const Tensor& x) {
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), 1 + x.numel() / kPerThread));
}

// While it lives, other threads of Python may run, if the work is worth it.
class Released {
 public:
  explicit Released(const Tensor& x) : state(x.numel() < kAlone ? nullptr : PyEval_SaveThread()) {}
  ~Released() {
    if (state) PyEval_RestoreThread(state);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state;
};

float* written(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr; }

const float* read(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

PyObject* none() { Py_RETURN_NONE; }

// A tuple of tensors, None for one that is not there.
PyObject* tuple_of(std::initializer_list<Tensor> tensors) {
  PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  Py_ssize_t i = 0;
  for (const Tensor& tensor : tensors)
    PyTuple_SET_ITEM(made, i++, tensor.defined() ? THPVariable_Wrap(tensor) : none());
  return made;
}

// A gradient in the order in which x lies in memory; that of a sum is one number for all features.
Tensor lying_as(const Tensor& grad, const Tensor& x) {
  return grad.strides() == x.strides() ? grad : at::empty_like(x).copy_(grad);
}

// Gradients [batch, channels] as one of what a modulation was: rows that all samples share get the sum.
Tensor as_given(const Tensor& rows, const Tensor& modulation) {
  const bool shared = modulation.numel() < rows.numel();
  return (shared ? rows.sum(0) : rows).view(modulation.sizes());
}

// film(x, gamma, beta, dim, relu, in_place): gamma * x + beta, or its ReLU; without a graph.
PyObject* film(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 6, "film: expected 6 arguments, got ", count);
  const Tensor *x = taken(given[0]), *gamma = taken(given[1]), *beta = taken(given[2]);
  const auto dim = whole(given[3]);
  if (!x || !gamma || !beta || !dim || watched()) return none();
  const auto at = layout_of(*x, *gamma, *beta, *dim);
  if (!at) return none();
  const bool relu = given[4] == Py_True, in_place = given[5] == Py_True;
  if (in_place && x->is_inference() && !c10::InferenceMode::is_enabled()) return none();
  if (in_place && (x->is_alias_of(*gamma) || x->is_alias_of(*beta))) return none();
  const Tensor y = in_place ? *x : at::empty_like(*x);
  {
    const Released released(*x);
    torchfilm::film_forward(read(*x), read(*gamma), read(*beta), written(y), *at, relu, threads_for(*x));
  }
  if (in_place) y.unsafeGetTensorImpl()->bump_version();
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// film_gradients(grad, x, gamma, beta, dim, relu): those of x, gamma and beta.
PyObject* film_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 6, "film_gradients: expected 6 arguments, got ", count);
  const Tensor *grad = taken(given[0]), *x = taken(given[1]), *gamma = taken(given[2]), *beta = taken(given[3]);
  const auto dim = whole(given[4]);
  if (!grad || !x || !gamma || !beta || !dim || watched()) return none();
  const auto at = layout_of(*x, *gamma, *beta, *dim);
  if (!at || grad->sizes() != x->sizes()) return none();
  const Tensor dy = lying_as(*grad, *x), dx = at::empty_like(*x);
  const Tensor dgamma = at::empty({at->batch, at->channels}, x->options()), dbeta = at::empty_like(dgamma);
  {
    const Released released(*x);
    torchfilm::film_backward(read(dy), read(*x), read(*gamma), read(*beta), written(dx), written(dgamma),
                             written(dbeta), *at, given[5] == Py_True, threads_for(*x));
  }
  return tuple_of({dx, as_given(dgamma, *gamma), as_given(dbeta, *beta)});
  END_HANDLE_TH_ERRORS
}

// A number for each channel, [channels] and contiguous, into `found`, which stays as it is for None; false for what
// the kernels do not take.
bool taken_row(PyObject* object, int64_t channels, Tensor& found) {
  if (object == Py_None) return true;
  const Tensor* tensor = taken(object);
  if (!tensor || tensor->dim() != 1 || tensor->size(0) != channels || !tensor->is_contiguous()) return false;
  found = *tensor;
  return true;
}

// How the features of a norm lie (kernels.h says what `number` is); nothing for what torch refuses too: groups of
// another size than the others, and of one number.
std::optional<Layout> layout_of_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t dim,
                                     int64_t number) {
  auto at = layout_of(x, gamma, beta, dim);
  if (!at || !x.is_contiguous()) return std::nullopt;
  at->in_columns = dim == -1;  // groups of channels with one position each lie in rows as well
  if (at->in_columns) return at;
  if (number < 1 || at->channels % number || at->channels / number * at->others == 1) return std::nullopt;
  return at;
}

// norm(x, gamma, beta, weight, bias, dim, number, eps): the norm + FiLM, means, and ones over standard deviations.
PyObject* norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 8, "norm: expected 8 arguments, got ", count);
  const Tensor *x = taken(given[0]), *gamma = taken(given[1]), *beta = taken(given[2]);
  const auto dim = whole(given[5]), number = whole(given[6]);
  const auto eps = real(given[7]);
  if (!x || !gamma || !beta || !dim || !number || !eps || watched()) return none();
  const auto at = layout_of_norm(*x, *gamma, *beta, *dim, *number);
  Tensor weight, bias;
  if (!at || !taken_row(given[3], at->channels, weight) || !taken_row(given[4], at->channels, bias))
    return none();
  const Tensor y = at::empty_like(*x);
  const Tensor mean = at::empty({at->batch, at->in_columns ? at->others : *number}, x->options());
  const Tensor rstd = at::empty_like(mean);
  {
    const Released released(*x);
    torchfilm::norm_forward(read(*x), read(*gamma), read(*beta), read(weight), read(bias), written(y), written(mean),
                            written(rstd), *at, *number, *eps, threads_for(*x));
  }
  return tuple_of({y, mean, rstd});
  END_HANDLE_TH_ERRORS
}

// norm_gradients(grad, x, gamma, weight, bias, mean, rstd, dim, number): of x, gamma, beta, weight and bias.
PyObject* norm_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "norm_gradients: expected 9 arguments, got ", count);
  const Tensor *grad = taken(given[0]), *x = taken(given[1]), *gamma = taken(given[2]);
  const Tensor *mean = taken(given[5]), *rstd = taken(given[6]);
  const auto dim = whole(given[7]), number = whole(given[8]);
  if (!grad || !x || !gamma || !mean || !rstd || !dim || !number || watched()) return none();
  const auto at = layout_of_norm(*x, *gamma, *gamma, *dim, *number);
  Tensor weight, bias;
  if (!at || grad->sizes() != x->sizes() || !taken_row(given[3], at->channels, weight) ||
      !taken_row(given[4], at->channels, bias))
    return none();
  if (mean->numel() != at->batch * (at->in_columns ? at->others : *number) || mean->sizes() != rstd->sizes())
    return none();
  const Tensor dy = lying_as(*grad, *x), dx = at::empty_like(*x);
  const Tensor dgamma = at::empty({at->batch, at->channels}, x->options()), dbeta = at::empty_like(dgamma);
  const Tensor dweight = weight.defined() ? at::zeros_like(weight) : weight;
  const Tensor dbias = bias.defined() ? at::zeros_like(bias) : bias;
  {
    const Released released(*x);
    torchfilm::norm_backward(read(dy), read(*x), read(*gamma), read(weight), read(bias), read(*mean), read(*rstd),
                             written(dx), written(dgamma), written(dbeta), written(dweight), written(dbias), *at,
                             *number, threads_for(*x));
  }
  return tuple_of({dx, as_given(dgamma, *gamma), as_given(dbeta, *gamma), dweight, dbias});
  END_HANDLE_TH_ERRORS
}

// Whether features have one of these numbers of axes, and their axis `dim`, if it is said, is that of the channels, 1.
bool in_channels(const Tensor& x, PyObject* axes, PyObject* dim) {
  PyObject* number = PyLong_FromLongLong(x.dim());
  const int among = PySequence_Contains(axes, number);
  Py_DECREF(number);
  if (among < 0) throw python_error();
  if (among == 0 || dim == Py_None) return among;
  const auto axis = whole(dim);
  return axis && (*axis == 1 || *axis == 1 - x.dim());
}

// An attribute of an object of Python's; null where there is none.
THPObjectPtr attribute(PyObject* object, PyObject* name) {
  PyObject* found = PyObject_GetAttr(object, name);
  if (!found) PyErr_Clear();
  return THPObjectPtr(found);
}

// What torch's module has under a name in one of its dictionaries; else its attribute: what is made of parameters.
THPObjectPtr member(PyObject* module, PyObject* kind, PyObject* name) {
  THPObjectPtr all = attribute(module, kind);
  PyObject* found = all && PyDict_Check(all.get()) ? PyDict_GetItemWithError(all.get(), name) : nullptr;
  if (!found) return attribute(module, name);
  Py_INCREF(found);
  return THPObjectPtr(found);
}

PyObject* named(const char* name) { return PyUnicode_InternFromString(name); }

// batch_norm(norm, x, modulation, axes, dim): gamma * norm(x) + beta of a batch norm in evaluation, without a graph and
// without a gate. Between convolutions, which empty the caches, all that Python looks at costs a microsecond: so the
// look is here. One modulation for all goes into the affine of torch's norm: that of the norms around is in the caches.
PyObject* batch_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject *const training = named("training"), *const parameters = named("_parameters");
  static PyObject *const buffers = named("_buffers"), *const names[] = {named("weight"), named("bias")};
  static PyObject *const statistics[] = {named("running_mean"), named("running_var")};
  static PyObject *const fields[] = {named("gamma"), named("beta"), named("gate")}, *const epsilon = named("eps");
  TORCH_CHECK(count == 5, "batch_norm: expected 5 arguments, got ", count);
  PyObject *module = given[0], *modulation = given[2];
  if (at::GradMode::is_enabled() || watched() || attribute(module, training).get() != Py_False) return none();
  THPObjectPtr of_gamma = attribute(modulation, fields[0]), of_beta = attribute(modulation, fields[1]);
  if (!of_gamma || !of_beta || attribute(modulation, fields[2]).get() != Py_None) return none();
  const Tensor *x = taken(given[1]), *gamma = taken(of_gamma.get()), *beta = taken(of_beta.get());
  THPObjectPtr of_eps = attribute(module, epsilon);
  const auto eps = of_eps ? real(of_eps.get()) : std::nullopt;
  if (!x || !gamma || !beta || !eps || gamma->dim() > 2 || !in_channels(*x, given[3], given[4])) return none();
  const auto at = layout_of(*x, *gamma, *beta, 1);
  if (!at) return none();
  Tensor weight, bias, mean, variance;
  const auto taken_member = [&](PyObject* kind, PyObject* name, Tensor& found) {
    THPObjectPtr object = member(module, kind, name);
    return object && taken_row(object.get(), at->channels, found);
  };
  if (!taken_member(parameters, names[0], weight) || !taken_member(parameters, names[1], bias) ||
      !taken_member(buffers, statistics[0], mean) || !taken_member(buffers, statistics[1], variance))
    return none();
  if (!mean.defined() || !variance.defined()) return none();
  const float *g = read(*gamma), *b = read(*beta), *w = read(weight), *own = read(bias);
  if (gamma->numel() == at->channels) {
    const Tensor scale = at::empty({at->channels}, x->options()), shift = at::empty_like(scale);
    float *into = written(scale), *onto = written(shift);
    for (int64_t c = 0; c < at->channels; ++c) {
      into[c] = w ? g[c] * w[c] : g[c];
      onto[c] = own ? g[c] * own[c] + b[c] : b[c];
    }
    Tensor y;
    {
      const Released released(*x);
      y = std::get<0>(at::native_batch_norm(*x, scale, shift, mean, variance, false, 0.0, *eps));
    }
    return THPVariable_Wrap(y);
  }
  const float *m = read(mean), *v = read(variance);
  Layout packed = *at;
  packed.strides = {at->channels, at->channels};
  std::vector<float> scale(at->batch * at->channels), shift(at->batch * at->channels);
  for (int64_t c = 0; c < at->channels; ++c) {
    const float factor = static_cast<float>((w ? w[c] : 1.0f) / std::sqrt(v[c] + *eps));
    const float offset = (own ? own[c] : 0.0f) - m[c] * factor;
    for (int64_t row = 0; row < at->batch; ++row) {
      const float own_gamma = g[row * at->strides.gamma + c];
      scale[row * at->channels + c] = own_gamma * factor;
      shift[row * at->channels + c] = own_gamma * offset + b[row * at->strides.beta + c];
    }
  }
  const Tensor y = at::empty_like(*x);
  {
    const Released released(*x);
    torchfilm::film_forward(read(*x), scale.data(), shift.data(), written(y), packed, false, threads_for(*x));
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// generated(z, weight, bias, offsets, sizes): weight z + bias + offsets for a single z, [..., columns] with one row,
// cut along the last axis: views of one tensor.
PyObject* generated(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5 && PyTuple_Check(given[4]), "generated: expected 5 arguments, the last a tuple");
  const Tensor *z = taken(given[0]), *weight = taken(given[1]);
  if (!z || !weight || watched() || autocast() || weight->dim() != 2 || !weight->is_contiguous()) return none();
  const int64_t rows = weight->size(0), columns = weight->size(1);
  if (z->dim() < 1 || z->size(-1) != columns || z->numel() != columns || !z->is_contiguous()) return none();
  Tensor bias, offsets;
  if (!taken_row(given[2], rows, bias) || !taken_row(given[3], rows, offsets)) return none();
  if (!bias.defined() || !offsets.defined()) return none();
  auto sizes = z->sizes().vec();
  sizes.back() = rows;
  const Tensor made = at::empty(sizes, z->options());
  {
    const Released released(*weight);
    torchfilm::linear(read(*z), read(*weight), read(bias), read(offsets), written(made), rows, columns,
                      threads_for(*weight));
  }
  const Py_ssize_t parts = PyTuple_GET_SIZE(given[4]);
  PyObject* found = PyTuple_New(parts);
  int64_t start = 0;
  for (Py_ssize_t i = 0; i < parts; start += sizes.back(), ++i) {
    sizes.back() = PyLong_AsLong(PyTuple_GET_ITEM(given[4], i));
    PyTuple_SET_ITEM(found, i, THPVariable_Wrap(made.as_strided(sizes, made.strides(), start)));
  }
  return found;
  END_HANDLE_TH_ERRORS
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef entry(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    entry("film", film), entry("film_gradients", film_gradients), entry("norm", norm),
    entry("norm_gradients", norm_gradients), entry("batch_norm", batch_norm), entry("generated", generated),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "torchfilm._kernels", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
