// A CUDA device without one: its memory is the host's, its kernels are the CPU's.
//
// Torch's CPU build knows the device type and its dispatch key, and has nothing behind them. What is put there:
//  - an allocator that counts, a device guard, hooks (what torch asks a backend), and a generator;
//  - for every operation, the CPU's kernel on the same memory. Operands on different devices are refused, as by CUDA;
//  - the debug mode that refuses what would make the host wait for a GPU.
// It shows that code runs on CUDA and what it computes; it says nothing of speed, nor of CUDA's own libraries.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;

const c10::Device kDevice(c10::kCUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// ---- what makes the host wait ----------------------------------------------------------------------------------

std::atomic<bool> waiting_is_refused{false};
thread_local int computing = 0;  // inside a kernel, copies between host and device are the emulation's own

struct Computing {
  Computing() { ++computing; }
  ~Computing() { --computing; }
};

void waits(const std::string& operation) {
  TORCH_CHECK(!waiting_is_refused || computing > 0, "called a synchronizing CUDA operation: ", operation);
}

// ---- memory ----------------------------------------------------------------------------------------------------

std::atomic<long> allocated{0}, peak{0};

void give_back(void* pointer) {
  allocated -= static_cast<long>(malloc_usable_size(pointer));
  c10::free_cpu(pointer);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    void* pointer = c10::alloc_cpu(bytes);
    long now = allocated += static_cast<long>(malloc_usable_size(pointer));
    for (long most = peak; now > most && !peak.compare_exchange_weak(most, now);) {}
    return {pointer, pointer, &give_back, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
struct Registered {
  Registered() { c10::SetAllocator(c10::kCUDA, &allocator); }
} registered;

// ---- random numbers: those of a CPU generator of its own --------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  at::Generator on_cpu = at::detail::createCPUGenerator();
  Generator() : GeneratorImpl(kDevice, kKeys) {}
  void set_current_seed(uint64_t seed) override { on_cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return on_cpu.current_seed(); }
  uint64_t seed() override { return on_cpu.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { on_cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return on_cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    auto* twin = new Generator();
    twin->on_cpu = on_cpu.clone();
    return twin;
  }
};

const at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

at::Generator on_cpu(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->on_cpu;
}

// ---- what torch asks a backend ---------------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getDefaultStream(c10::Device) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(at::DeviceIndex) const override {
    static bool first = true;  // Python makes its handle of the default generator by asking for a new one
    return std::exchange(first, false) ? default_generator() : at::make_generator<Generator>();
  }
};

// ---- tensors ---------------------------------------------------------------------------------------------------

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           kKeys, c10::dtype_or_default(dtype));
}

/// The same memory as a tensor of the CPU.
Tensor host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  at::AutoDispatchBelowADInplaceOrView below;
  const c10::Storage& storage = t.storage();
  auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr pointer(const_cast<void*>(storage.data()), new c10::Storage(storage), release, c10::kCPU);
  c10::Storage shared(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), c10::GetAllocator(c10::kCPU), true);
  auto on_cpu = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  on_cpu.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return on_cpu;
}

/// A copy of a tensor of the CPU.
Tensor device(const Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  Tensor copy = at::empty_strided(t.sizes(), t.strides(), t.options().device(kDevice));
  host(copy).copy_(t);
  return copy;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.is_cuda() != from.is_cuda() && !non_blocking) waits("a copy between host and device");
  Computing now;
  host(self).copy_(host(from));
  return self;
}

at::Scalar item(const Tensor& self) {
  waits("item");
  return at::_local_scalar_dense(host(self));
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef new_size, std::optional<at::MemoryFormat> format) {
  IntArrayRef size = C10_AS_INTARRAYREF_SLOW(new_size);
  size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    c10::DataPtr larger = allocator.allocate(bytes);
    if (storage->nbytes() > 0) std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor& set_strided(Tensor& self, at::Storage storage, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage storage) {
  int64_t size = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_strided(self, std::move(storage), 0, {size}, {1});
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// ---- kernels ---------------------------------------------------------------------------------------------------

// Torch chooses a convolution's kernel by device, and CUDA's are not there to be found.

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   c10::SymInt groups) {
  bool biased = bias && bias->defined();
  TORCH_CHECK(x.is_cuda() && w.is_cuda() && (!biased || bias->is_cuda()),
              "convolution: Expected all tensors to be on the same device");
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), "Input type (", x.toString(), ") and weight type (", w.toString(),
              ") should be the same");
  Computing now;
  auto host_bias = biased ? std::optional<Tensor>(host(*bias)) : std::nullopt;
  return device(at::convolution_symint(
      host(x), host(w), host_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w, at::OptionalSymIntArrayRef bias, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  TORCH_CHECK(grad.is_cuda() && x.is_cuda() && w.is_cuda(),
              "convolution_backward: Expected all tensors to be on the same device");
  Computing now;
  auto [of_x, of_w, of_bias] = at::convolution_backward_symint(
      host(grad), host(x), host(w), bias, stride, padding, dilation, transposed, output_padding, groups, wanted);
  return {device(of_x), device(of_w), device(of_bias)};
}

using List = c10::List<Tensor>;
using OptionalList = c10::List<std::optional<Tensor>>;

/// `value` with `change` made to every tensor in it.
template <class Change>
c10::IValue changed(const c10::IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    List out;
    for (const Tensor& t : value.toTensorVector()) out.push_back(change(t));
    return out;
  }
  if (value.isOptionalTensorList()) {
    OptionalList out;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) {
      out.push_back(t ? std::optional<Tensor>(change(*t)) : t);
    }
    return out;
  }
  return value;
}

/// Refuse operands that CUDA would refuse, and what would make the host wait.
void check(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  static const std::set<std::string> reading = {
      "aten::bincount", "aten::equal", "aten::masked_select", "aten::nonzero", "aten::repeat_interleave",
      "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim"};
  if (reading.count(name)) waits(name);
  bool on_device = false, on_host = false;
  for (const auto& value : arguments) {
    // Indices of the host's may choose from a tensor of the device: the other way round, they may not.
    bool indices = value.isOptionalTensorList() && arguments[0].isTensor() && arguments[0].toTensor().is_cuda();
    changed(value, [&](const Tensor& t) {
      if (!t.defined()) return t;
      if (t.is_cuda()) on_device = true;
      if (!t.is_cuda() && t.dim() > 0 && !indices) on_host = true;  // a number of the host's may take part
      if (indices && !t.is_cuda()) waits("indices of the host's");
      if (indices && t.scalar_type() == at::kBool) waits("an index of booleans");
      return t;
    });
  }
  TORCH_CHECK(!on_device || !on_host, name, ": Expected all tensors to be on the same device");
  for (const auto& value : arguments) {
    TORCH_CHECK(!on_device || !value.isGenerator() || value.toGenerator().device().is_cuda(), name,
                ": Expected a 'cuda' device type for generator");
  }
}

/// Every operation that is not registered below: the CPU's kernel on the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& parameters = schema.arguments();
  auto arguments = torch::jit::pop(*stack, parameters.size());
  check(schema.name(), arguments);
  auto is_generator = [](const c10::Argument& p) { return p.name() == "generator"; };
  bool takes_one = std::any_of(parameters.begin(), parameters.end(), is_generator);
  TORCH_CHECK(takes_one || !op.hasTag(at::Tag::nondeterministic_seeded), schema.name(),
              " draws from a generator that it is not given: the emulated GPU must be taught it");
  Computing now;
  at::AutoDispatchBelowADInplaceOrView below;
  std::vector<c10::IValue> on_host;
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto& value = arguments[i];
    bool draws = parameters[i].name() == "generator" && (value.isNone() || value.toGenerator().device().is_cuda());
    on_host.push_back(draws              ? on_cpu(value.isNone() ? default_generator() : value.toGenerator())
                      : value.isDevice() ? c10::IValue(c10::Device(c10::kCPU))
                                         : changed(value, host));
  }
  for (const auto& value : on_host) stack->push_back(value);
  op.callBoxed(*stack);
  for (size_t i = 0; i < parameters.size(); ++i) {  // an output that the kernel has given another size
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    const Tensor& was = arguments[i].toTensor();
    const Tensor& is = on_host[i].toTensor();
    if (!was.is_cuda() || was.sizes() == is.sizes()) continue;
    resize_(was, is.sym_sizes(), std::nullopt);
    was.unsafeGetTensorImpl()->set_sizes_and_strides(is.sizes(), is.strides());
    host(was).copy_(is);
  }
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t r = 0; r < results.size(); ++r) {
    const auto* alias = schema.returns()[r].alias_info();
    TORCH_CHECK(!alias || alias->isWrite(), schema.name(), " returns a view: the emulated GPU must be taught it");
    auto same = [&](const c10::Argument& p) { return alias && p.alias_info() && *p.alias_info() == *alias; };
    auto written = std::find_if(parameters.begin(), parameters.end(), same);
    stack->push_back(written == parameters.end() ? changed(results[r], device)
                                                 : arguments[written - parameters.begin()]);
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}

extern "C" {
void refuse_waiting(bool refuse) { waiting_is_refused = refuse; }
long memory_allocated() { return allocated; }
long max_memory_allocated() { return peak; }
void reset_peak_memory_stats() { peak = allocated.load(); }
}
