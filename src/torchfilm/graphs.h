// Nodes of torch's graphs, which go back by kernels.cpp: between the layers of a network, whose work empties the
// caches, a node in Python costs as much as a pass over megabytes.
//
// What the kernels do not take on the way back goes by torch's own operations, in onepass.py: gradients that are
// differentiated again, several at once, and tensors that were kept and come back as others.

#pragma once

#include <Python.h>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace torchfilm {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Whether the kernels go back over these, and torch needs nothing else of them.
inline bool all_taken(std::initializer_list<Tensor> tensors) {
  if (at::GradMode::is_enabled() || watched()) return false;
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& own) { return !own.defined() || plain(own); });
}

// Whether these are `count` numbers that lie side by side, or nothing: hooks may give back other memory than was kept.
inline bool in_a_row(const Tensor& own, int64_t count) {
  return !own.defined() || (own.numel() == count && own.is_contiguous());
}

// A gradient in the order in which x lies in memory; that of a sum is one number for all features.
inline Tensor lying_as(const Tensor& grad, const Tensor& x) {
  return grad.strides() == x.strides() ? grad : at::empty_like(x).copy_(grad);
}

// Gradients [batch, channels] as one of what a modulation was: rows that all samples share get the sum.
inline Tensor as_given(const Tensor& rows, at::IntArrayRef sizes) {
  const bool shared = c10::multiply_integers(sizes) < rows.numel();
  return (shared ? rows.sum(0) : rows).view(sizes);
}

inline PyObject* wrapped(const Tensor& tensor) {
  if (tensor.defined()) return THPVariable_Wrap(tensor);
  Py_RETURN_NONE;
}

inline PyObject* wrapped(bool value) { return PyBool_FromLong(value); }

inline PyObject* wrapped(const std::vector<int64_t>& numbers) {
  PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t i = 0; i < numbers.size(); ++i) PyTuple_SET_ITEM(made, i, PyLong_FromLongLong(numbers[i]));
  return made;
}

inline PyObject* wrapped(const std::vector<bool>& values) {
  PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) PyTuple_SET_ITEM(made, i, wrapped(values[i]));
  return made;
}

// Which norm: kernels.h.
struct Plan {
  int64_t dim, number;
  double eps;
};

inline PyObject* wrapped(const Plan& plan) { return Py_BuildValue("(LLd)", plan.dim, plan.number, plan.eps); }

// What a function of onepass.py returns: a gradient, or None, for each input.
template <typename... Given>
variable_list by_torch(const char* name, const Given&... given) {
  struct Held {
    PyGILState_STATE state = PyGILState_Ensure();
    ~Held() { PyGILState_Release(state); }
  } held;
  const auto found = [](PyObject* object) {
    if (!object) {
      python_error error;
      error.persist();
      throw std::move(error);
    }
    return THPObjectPtr(object);
  };
  THPObjectPtr module = found(PyImport_ImportModule("torchfilm.onepass"));
  THPObjectPtr function = found(PyObject_GetAttrString(module.get(), name));
  THPObjectPtr arguments = found(PyTuple_New(sizeof...(given)));
  Py_ssize_t place = 0;
  (PyTuple_SET_ITEM(arguments.get(), place++, wrapped(given)), ...);
  THPObjectPtr gradients = found(PyObject_CallObject(function.get(), arguments.get()));
  variable_list made;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(gradients.get()); ++i) {
    PyObject* one = PyTuple_GET_ITEM(gradients.get(), i);
    made.push_back(one == Py_None ? Tensor() : THPVariable_Unpack(one));
  }
  return made;
}

// Which of the first inputs need a gradient; of the others none does.
inline std::vector<bool> needed(AutogradContext* ctx, size_t first, size_t inputs) {
  std::vector<bool> found(inputs);
  for (size_t i = 0; i < first; ++i) found[i] = ctx->needs_input_grad(i);
  return found;
}

// FiLM that is made, and what its node keeps besides its inputs.
struct Filmed {
  Tensor y, gamma, beta;  // with an axis for each of the features', and a graph of their own
  int64_t dim;
  bool relu, for_x, for_gamma;  // which need a gradient: forward may run within a backward pass, which asks for others
};

// It keeps what torch's product and ReLU keep: checkpoints compare what is kept with what is kept again, which may be
// the other way. Of a product gamma for x, and x for gamma.
struct Film : Function<Film> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gamma, const Tensor&,
                        const Filmed& made) {
    ctx->saved_data["dim"] = made.dim;
    ctx->saved_data["relu"] = made.relu;
    ctx->saved_data["sizes"] = gamma.sizes();
    ctx->saved_data["rows"] = made.gamma.sizes();
    if (made.relu) {
      ctx->save_for_backward({x, made.gamma, made.beta});
    } else {
      ctx->save_for_backward({made.for_x ? made.gamma : Tensor(), made.for_gamma ? x : Tensor()});
    }
    return made.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool relu = ctx->saved_data["relu"].toBool();
    const Tensor &grad = grads[0], &x = saved[relu ? 0 : 1], &gamma = saved[relu ? 1 : 0];
    const Tensor beta = relu ? saved[2] : gamma;  // of which nothing is read without a ReLU
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (!grad.defined()) return variable_list(4);
    std::optional<Layout> at;
    if (x.defined() && gamma.defined() && grad.sizes() == x.sizes() && all_taken({grad, x, gamma, beta}))
      at = layout_of(x, gamma, beta, dim);
    if (!at) {
      const std::vector<int64_t> rows = ctx->saved_data["rows"].toIntVector();
      auto found = by_torch("film_gradients", grad, x, gamma, beta, rows, relu, needed(ctx, 3, 3));
      for (size_t i : {1, 2})
        if (found[i].defined()) found[i] = found[i].reshape(sizes);
      found.emplace_back();
      return found;
    }
    const Tensor dy = lying_as(grad, x), dx = at::empty_like(x);
    const Tensor dgamma = at::empty({at->batch, at->channels}, x.options()), dbeta = at::empty_like(dgamma);
    film_backward(read(dy), read(x), read(gamma), read(beta), written(dx), written(dgamma), written(dbeta), *at, relu,
                  threads_for(x));
    return {dx, as_given(dgamma, sizes), as_given(dbeta, sizes), Tensor()};
  }
};

// A norm + FiLM that is made.
struct Normed {
  Tensor y, mean, rstd;
  Plan plan;
};

struct Norm : Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gamma, const Tensor&,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Normed& made) {
    ctx->saved_data["dim"] = made.plan.dim;
    ctx->saved_data["number"] = made.plan.number;
    ctx->saved_data["eps"] = made.plan.eps;
    ctx->save_for_backward({x, gamma, weight.value_or(Tensor()), bias.value_or(Tensor()), made.mean, made.rstd});
    return made.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &x = saved[0], &gamma = saved[1], &weight = saved[2], &bias = saved[3];
    const Tensor &mean = saved[4], &rstd = saved[5];
    const Plan plan{ctx->saved_data["dim"].toInt(), ctx->saved_data["number"].toInt(),
                    ctx->saved_data["eps"].toDouble()};
    if (!grad.defined()) return variable_list(6);
    std::optional<Layout> at;
    if (grad.sizes() == x.sizes() && all_taken({grad, x, gamma, weight, bias, mean, rstd}))
      at = layout_of_norm(x, gamma, gamma, plan.dim, plan.number);
    const int64_t groups = at ? at->batch * (at->in_columns ? at->others : plan.number) : 0;
    if (!at || !in_a_row(mean, groups) || !in_a_row(rstd, groups) || !in_a_row(weight, at->channels) ||
        !in_a_row(bias, at->channels)) {
      const size_t given = 3 + weight.defined() + bias.defined();
      auto found = by_torch("norm_gradients", grad, x, gamma, weight, bias, plan, needed(ctx, given, 5));
      found.emplace_back();
      return found;
    }
    const Tensor dy = lying_as(grad, x), dx = at::empty_like(x);
    const Tensor dgamma = at::empty({at->batch, at->channels}, x.options()), dbeta = at::empty_like(dgamma);
    const Tensor dweight = weight.defined() ? at::zeros_like(weight) : weight;
    const Tensor dbias = bias.defined() ? at::zeros_like(bias) : bias;
    norm_backward(read(dy), read(x), read(gamma), read(weight), read(bias), read(mean), read(rstd), written(dx),
                  written(dgamma), written(dbeta), written(dweight), written(dbias), *at, plan.number, threads_for(x));
    return {dx, as_given(dgamma, gamma.sizes()), as_given(dbeta, gamma.sizes()), dweight, dbias, Tensor()};
  }
};

// y = gamma * x + beta, or its ReLU, made of these already, with a graph.
inline Tensor film_in_graph(const Tensor& y, const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t dim,
                            bool relu) {
  std::vector<int64_t> rows(x.dim(), 1);
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  rows[axis] = x.size(axis);
  rows[0] = gamma.numel() / x.size(axis);
  const Tensor shift = relu ? beta.view(rows) : beta;
  const Filmed made{y, gamma.view(rows), shift, dim, relu, x.requires_grad(), gamma.requires_grad()};
  return Film::apply(x, gamma, beta, made);
}

// The norm + FiLM of these, with a graph.
inline Tensor norm_in_graph(const Normed& made, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                            const Tensor& weight, const Tensor& bias) {
  const auto given = [](const Tensor& own) { return own.defined() ? std::optional(own) : std::nullopt; };
  return Norm::apply(x, gamma, beta, given(weight), given(bias), made);
}

}  // namespace torchfilm
