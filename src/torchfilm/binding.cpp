// The way from Python to kernels.cpp: which tensors they take, where these lie, and what comes back.
//
// Python's module is `torchfilm._kernels`. A function returns None for tensors that the kernels do not take: other
// devices and precisions, subclasses, gaps in memory, tensors that a transform or a mode of torch watches. Sizes that
// do not fit are among what is not taken; functional.py explains them.

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "graphs.h"

namespace {

using namespace torchfilm;

constexpr int64_t kAlone = 65536;  // from here on other threads of Python go on meanwhile

// Whether products are taken in another precision here.
bool autocast() { return !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutocastCPU); }

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

PyObject* none() { Py_RETURN_NONE; }

// Whether what comes of these is differentiated.
bool has_graph(std::initializer_list<Tensor> tensors) {
  const auto needs = [](const Tensor& own) { return own.defined() && own.requires_grad(); };
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), needs);
}

// film(x, gamma, beta, dim, relu, in_place): gamma * x + beta, or its ReLU. In place where there is no graph.
PyObject* film(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 6, "film: expected 6 arguments, got ", count);
  const Tensor *x = taken(given[0]), *gamma = taken(given[1]), *beta = taken(given[2]);
  const auto dim = whole(given[3]);
  if (!x || !gamma || !beta || !dim || watched()) return none();
  const auto at = layout_of(*x, *gamma, *beta, *dim);
  if (!at) return none();
  const bool relu = given[4] == Py_True, graph = has_graph({*x, *gamma, *beta});
  const bool in_place = given[5] == Py_True && !graph;
  if (in_place && x->is_inference() && !c10::InferenceMode::is_enabled()) return none();
  if (in_place && (x->is_alias_of(*gamma) || x->is_alias_of(*beta))) return none();
  const Tensor y = in_place ? *x : at::empty_like(*x);
  {
    const Released released(*x);
    film_forward(read(*x), read(*gamma), read(*beta), written(y), *at, relu, threads_for(*x));
  }
  if (in_place) y.unsafeGetTensorImpl()->bump_version();
  return THPVariable_Wrap(graph ? film_in_graph(y, *x, *gamma, *beta, *dim, relu) : y);
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

// norm(x, gamma, beta, weight, bias, dim, number, eps): the norm + FiLM. There is no bias without a weight.
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
  if (bias.defined() && !weight.defined()) return none();
  const bool graph = has_graph({*x, *gamma, *beta, weight, bias});
  if (graph && !x->requires_grad() && !gamma->requires_grad()) return none();  // torch keeps less there
  // Back over rows of few samples torch's own norm goes with all threads; it takes a modulation for all of them.
  if (graph && at->in_columns && at->strides.gamma == 0 && at->batch < threads_for(*x)) return none();
  const Tensor y = at::empty_like(*x);
  const Tensor mean = at::empty({at->batch, at->in_columns ? at->others : *number}, x->options());
  const Tensor rstd = at::empty_like(mean);
  {
    const Released released(*x);
    norm_forward(read(*x), read(*gamma), read(*beta), read(weight), read(bias), written(y), written(mean),
                 written(rstd), *at, *number, *eps, threads_for(*x));
  }
  if (!graph) return THPVariable_Wrap(y);
  const Normed made{y, mean, rstd, {*dim, *number, *eps}};
  return THPVariable_Wrap(norm_in_graph(made, *x, *gamma, *beta, weight, bias));
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
    film_forward(read(*x), scale.data(), shift.data(), written(y), packed, false, threads_for(*x));
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
    linear(read(*z), read(*weight), read(bias), read(offsets), written(made), rows, columns, threads_for(*weight));
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
    entry("film", film), entry("norm", norm), entry("batch_norm", batch_norm), entry("generated", generated),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "torchfilm._kernels", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
