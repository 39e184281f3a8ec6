// wgmma with its first operand in registers, for each number of columns that kernels use.
#pragma once

namespace awq::cuda::ptx {

/// d += a b (d = a b where `accumulate` is false), by the 128 threads of a warp group: a 64 x 16, b 16 x kColumns, d 64
/// x kColumns float. Warp w has rows 16 w .. 16 w + 15 of a and d; with r = lane / 4, t = lane % 4, a[0..3] are as
/// mma's, and d[4j .. 4j + 3] are (r, 8j + 2t), (r, 8j + 2t + 1), (r + 8, 8j + 2t), (r + 8, 8j + 2t + 1). b is
/// described by wgmma_descriptor. It runs on while the threads do: until wgmma_wait, a and b must not be written and d
/// not be touched. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
template <DType kType, int kColumns>
AWQ_DEVICE void wgmma(float (&d)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate);

// To compilers, wgmma has used its registers when it is issued: what comes after it could be moved to before its wait,
// or be given the registers of a to write to. (ptxas does that until CUDA 13.3, whose release notes tell.) So after the
// wait, d and a are settled: used once more.

template <int kCount>
AWQ_DEVICE void wgmma_settle(float (&d)[kCount]) {
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
/// `not_zero` is never zero, but no compiler can know.
AWQ_DEVICE void wgmma_settle(const std::uint32_t (&a)[4], Shared not_zero) {
  asm volatile(
      "{\n.reg .pred never;\nsetp.eq.u32 never, %4, 0;\n@never st.shared.v4.u32 [%4], {%0, %1, %2, %3};\n}" ::"r"(a[0]),
      "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(not_zero)
      : "memory");
}

// The instruction names each register of d: AWQ_NAMES is that list and AWQ_D its operands, from d[i] on.
#define AWQ_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define AWQ_NAMES_16 AWQ_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define AWQ_NAMES_32 AWQ_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define AWQ_NAMES_48 AWQ_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define AWQ_NAMES_64 AWQ_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define AWQ_NAMES_96                                                                                            \
  AWQ_NAMES_64                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define AWQ_NAMES_128                                                                                          \
  AWQ_NAMES_96                                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define AWQ_D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define AWQ_D_8(i) AWQ_D_4(i), AWQ_D_4(i + 4)
#define AWQ_D_16(i) AWQ_D_8(i), AWQ_D_8(i + 8)
#define AWQ_D_32(i) AWQ_D_16(i), AWQ_D_16(i + 16)
#define AWQ_D_48(i) AWQ_D_32(i), AWQ_D_16(i + 32)
#define AWQ_D_64(i) AWQ_D_32(i), AWQ_D_32(i + 32)
#define AWQ_D_96(i) AWQ_D_64(i), AWQ_D_32(i + 64)
#define AWQ_D_128(i) AWQ_D_64(i), AWQ_D_64(i + 64)

// `count` registers of d, then a's names, b's and that of `accumulate`, in one list. Factors of a and b are 1; b is not
// transposed.
#define AWQ_WGMMA(type, columns, count, a_names, b_name, accumulate_name)                                            \
  template <>                                                                                                        \
  AWQ_DEVICE void wgmma<DType::type, columns>(float(&d)[count], const std::uint32_t(&a)[4], std::uint64_t b,         \
                                              bool accumulate) {                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " accumulate_name                                             \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type " {" AWQ_NAMES_##count      \
                 "}, {" a_names "}, " b_name ", add, 1, 1, 0;\n}"                                                    \
                 : AWQ_D_##count(0)                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<std::uint32_t>(accumulate))); \
  }
#define AWQ_WGMMA_TYPES(...) AWQ_WGMMA(f16, __VA_ARGS__) AWQ_WGMMA(bf16, __VA_ARGS__)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
AWQ_WGMMA_TYPES(16, 8, "%8, %9, %10, %11", "%12", "%13")
AWQ_WGMMA_TYPES(32, 16, "%16, %17, %18, %19", "%20", "%21")
AWQ_WGMMA_TYPES(64, 32, "%32, %33, %34, %35", "%36", "%37")
AWQ_WGMMA_TYPES(96, 48, "%48, %49, %50, %51", "%52", "%53")
AWQ_WGMMA_TYPES(128, 64, "%64, %65, %66, %67", "%68", "%69")
AWQ_WGMMA_TYPES(192, 96, "%96, %97, %98, %99", "%100", "%101")
AWQ_WGMMA_TYPES(256, 128, "%128, %129, %130, %131", "%132", "%133")
#endif

#undef AWQ_WGMMA_TYPES
#undef AWQ_WGMMA
#undef AWQ_D_128
#undef AWQ_D_96
#undef AWQ_D_64
#undef AWQ_D_48
#undef AWQ_D_32
#undef AWQ_D_16
#undef AWQ_D_8
#undef AWQ_D_4
#undef AWQ_NAMES_128
#undef AWQ_NAMES_96
#undef AWQ_NAMES_64
#undef AWQ_NAMES_48
#undef AWQ_NAMES_32
#undef AWQ_NAMES_16
#undef AWQ_NAMES_8

}  // namespace awq::cuda::ptx
