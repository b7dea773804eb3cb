// What one lane computes: types, access to rows of registers, and the functions of the expressions
// in `alu`, each of which has its other form there.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef int8_t s8;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef float f32;

#define IN(kind, x) IN_##kind(x)
#define IN_u8(x) ((u8)p##x[l])
#define IN_s8(x) ((s8)p##x[l])
#define IN_u16(x) ((u16)p##x[l])
#define IN_s16(x) ((s16)p##x[l])
#define IN_u32(x) (p##x[l])
#define IN_s32(x) ((s32)p##x[l])
#define IN_f32(x) (((const f32 *)p##x)[l])
#define IN_u64(x) (((const u64 *)p##x)[l])
#define IN_s64(x) (((const s64 *)p##x)[l])
#define IN_number(x) (i->x)
#define IN_pred(x) (q##x >> l & 1)

// For the active lanes `m`; all of them are a loop that the compiler vectorises.
#define EACH(body)                                                                       \
  {                                                                                      \
    if (m == ~0u) {                                                                      \
      _Pragma("GCC ivdep") for (int l = 0; l < 32; l++) { body; }                        \
    } else {                                                                             \
      for (u32 rest_ = m; rest_; rest_ &= rest_ - 1) { int l = __builtin_ctz(rest_); body; } \
    }                                                                                    \
  }
#define OUT_u16(value) EACH(pd[l] = (u16)(value))
#define OUT_s16(value) EACH(pd[l] = (u16)(value))
#define OUT_u32(value) EACH(pd[l] = (u32)(value))
#define OUT_s32(value) EACH(pd[l] = (u32)(value))
#define OUT_f32(value) EACH(f32 v = (value); ((f32 *)pd)[l] = v != v ? quiet_nan() : v)
#define OUT_u64(value) EACH(((u64 *)pd)[l] = (u64)(value))
#define OUT_s64(value) EACH(((s64 *)pd)[l] = (s64)(value))
#define OUT_mask(value) w->predicates[i->d] = (w->predicates[i->d] & ~m) | ((value) & m);
#define OUT_pred(value)                                                                  \
  {                                                                                      \
    u32 bits = 0;                                                                        \
    for (int l = 0; l < 32; l++) bits |= (u32)((value) != 0) << l;                       \
    OUT_mask(bits)                                                                       \
  }

#define select(condition, a, b) ((condition) ? (a) : (b))
#define to_u8(x) ((u8)(x))
#define to_s8(x) ((s8)(x))
#define to_u16(x) ((u16)(x))
#define to_s16(x) ((s16)(x))
#define to_u32(x) ((u32)(x))
#define to_s32(x) ((s32)(x))
#define to_u64(x) ((u64)(x))
#define to_s64(x) ((s64)(x))
#define to_f32(x) ((f32)(x))

static inline s64 quotient(s64 a, s64 b) { return b == 0 ? -1 : a / b; }
static inline s64 remainder_(s64 a, s64 b) { return b == 0 ? a : a % b; }
#define remainder remainder_
static inline u32 popc(u32 a) { return __builtin_popcount(a); }
static inline u32 clz(u32 a) { return a ? __builtin_clz(a) : 32; }
static inline u32 brev(u32 a) {
  u32 r = 0;
  for (int k = 0; k < 32; k++) r |= (a >> k & 1) << (31 - k);
  return r;
}
static inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 pool = a | (u64)b << 32;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 pick = selector >> 4 * k & 15, byte = pool >> (pick & 7) * 8 & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * k;
  }
  return r;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int k = 0; k < 8; k++)
    r |= -(table >> k & 1) & (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}
static inline u32 field(u32 a, u32 position, u32 length) {
  position &= 255, length &= 255;
  u32 r = position < 32 ? a >> position : 0;
  return length < 32 ? r & ((1u << length) - 1) : r;
}
static inline s32 signed_field(s32 a, u32 position, u32 length) {
  position &= 255, length &= 255;
  u32 room = length < 32 ? 32 - length : 0;
  s32 r = a >> (position < 31 ? position : 31);
  return length ? (s32)((u32)r << room) >> room : 0;
}
static inline u32 word_of(f32 x) { u32 w; memcpy(&w, &x, 4); return w; }
static inline f32 float_of(u32 w) { f32 x; memcpy(&x, &w, 4); return x; }
static inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
static inline f32 quiet_nan(void) { return float_of(0x7fffffff); }
static inline f32 minimum(f32 a, f32 b) {
  if (a != a) return b != b ? quiet_nan() : b;
  if (b != b) return a;
  return a == b ? (word_of(a) >> 31 ? a : b) : a < b ? a : b;
}
static inline f32 maximum(f32 a, f32 b) {
  if (a != a) return b != b ? quiet_nan() : b;
  if (b != b) return a;
  return a == b ? (word_of(a) >> 31 ? b : a) : a > b ? a : b;
}
static inline f32 minimum_nan(f32 a, f32 b) { return a != a || b != b ? quiet_nan() : minimum(a, b); }
static inline f32 maximum_nan(f32 a, f32 b) { return a != a || b != b ? quiet_nan() : maximum(a, b); }
static inline f32 flush(f32 x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline f32 ex2(f32 x) { return flush((f32)exp2((double)flush(x))); }
static inline f32 rcp(f32 x) { return flush(1 / flush(x)); }
static inline f32 rsqrt(f32 x) { return flush((f32)(1 / sqrt((double)flush(x)))); }
static inline u32 bf16(f32 x) {
  u32 w = word_of(x);
  return x != x ? 0x7fff : (w + (w >> 16 & 1) + 0x7fff) >> 16;
}
static inline u32 e4m3(f32 x) {
  if (x != x) return 127;
  f32 size = fabsf(x) > 448 ? 448 : fabsf(x);
  int exponent = (int)(word_of(size) >> 23) - 127;
  if (exponent < -6) exponent = -6;
  u32 units = (u32)rintf(size * float_of((u32)(127 + 3 - exponent) << 23));
  return (units + (exponent + 6) * 8) | (word_of(x) >> 31) << 7;
}
