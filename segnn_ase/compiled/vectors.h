/* Vectors of the machine's width, and what acts on them. `c_code.prelude` writes before it the type REAL of the numbers,
   INT of the same size, and the constants of the exponential function. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef REAL T;
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef T V __attribute__((vector_size(BYTES), may_alias));
typedef INT I __attribute__((vector_size(BYTES), may_alias));
#define W ((int)(BYTES / sizeof(T)))
#define INLINE static inline __attribute__((always_inline))
INLINE V load(const T *p, const int n) {
  V v = {0};
  if (n == W) __builtin_memcpy(&v, p, sizeof(V)); else __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
INLINE void store(T *p, V v, const int n) {
  if (n == W) __builtin_memcpy(p, &v, sizeof(V)); else __builtin_memcpy(p, &v, n * sizeof(T));
}
#define FOLD(half, whole, bytes) \
  typedef T half __attribute__((vector_size(bytes), may_alias)); \
  INLINE half fold_##half(whole v) { half a, b; \
    __builtin_memcpy(&a, &v, bytes); __builtin_memcpy(&b, (char *)&v + bytes, bytes); return a + b; }
typedef T V64 __attribute__((vector_size(64), may_alias));
FOLD(V32, V64, 32)
FOLD(V16, V32, 16)
FOLD(V8, V16, 8)
INLINE T lanes(V v) {
#if BYTES == 64
  const V8 pair = fold_V8(fold_V16(fold_V32(v)));
#elif BYTES == 32
  const V8 pair = fold_V8(fold_V16(v));
#else
  const V8 pair = fold_V8(v);
#endif
  T s = pair[0];
  for (unsigned k = 1; k < 8 / sizeof(T); k++) s += pair[k];
  return s;
}
INLINE V choose(I mask, V a, V b) { return (V)(((I)a & mask) | ((I)b & ~mask)); }
/* one number of each of n rows, stride apart, or of the rows that are named */
INLINE V gathered(const T *p, const int64_t stride, const int n) {
  T x[W];
  for (int l = 0; l < W; l++) x[l] = p[(l < n ? l : 0) * stride];
  return load(x, W);
}
INLINE V picked(const T *p, const int64_t stride, const int64_t *rows, const int n) {
  T x[W];
  for (int l = 0; l < W; l++) x[l] = p[rows[l < n ? l : 0] * stride];
  return load(x, W);
}
INLINE void scatter(T *p, const int64_t stride, V v, const int n) {
  T x[W];
  store(x, v, W);
  for (int l = 0; l < n; l++) p[l * stride] = x[l];
}
/* NaN stays NaN */
INLINE V at_least(V x, T least) { return choose(x < least, (V){0} + least, x); }
INLINE V above(V x, T least) { return choose(x < least, (V){0}, (V){0} + 1); }
#define EACH(name, function) \
  INLINE V name(V x) { \
    T y[W]; \
    store(y, x, W); \
    for (int l = 0; l < W; l++) y[l] = sizeof(T) == 4 ? function##f(y[l]) : function(y[l]); \
    return load(y, W); \
  }
EACH(root, __builtin_sqrt)
EACH(sine, __builtin_sin)
EACH(cosine, __builtin_cos)
/* of two numbers; the second where the first is NaN */
#if defined(__AVX__)
INLINE V least(V a, V b) { V c; __asm__("vminp" LETTER " %2, %1, %0" : "=v"(c) : "v"(a), "vm"(b)); return c; }
INLINE V most(V a, V b) { V c; __asm__("vmaxp" LETTER " %2, %1, %0" : "=v"(c) : "v"(a), "vm"(b)); return c; }
#else
INLINE V least(V a, V b) { return choose(a < b, a, b); }
INLINE V most(V a, V b) { return choose(a > b, a, b); }
#endif
/* 1 / (1 + exp(-x)): exp(-x) = 2^-k exp(-r), x = k ln(2) + r, |r| < ln(2)/2; k is rounded by adding MAGIC */
INLINE V sigmoid(V x) {
  const V limit = (V){0} + (T)LIMIT, magic = (V){0} + (T)MAGIC;
  const V y = most(least(x, limit), -limit);
  const V rounded = y * (T)1.4426950408889634 + magic;
  const V k = rounded - magic;
  const V r = (y - k * (T)LN2_HIGH) - k * (T)LN2_LOW;
  const V e = EXP_SERIES;
  const V scale = (V)((((I)magic + BIAS) - (I)rounded) << MANTISSA);
  return 1 / (1 + e * scale);
}
