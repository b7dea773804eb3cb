// Tensor cores: one warp's share of an instruction, with the sums of `sums.py`.
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef f32 Floats __attribute__((vector_size(32), aligned(4)));
typedef s32 Words __attribute__((vector_size(32), aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
typedef s64 Longs __attribute__((vector_size(64)));

enum { LOWEST = -600, ZERO = -2000, FAR = 100 };  // of a zero, also times others; those for which float32 will do
typedef struct { s32 places, kept, min_exponent, depth; } Sums;
static const Sums SUMS[] = {{13, 13, -6, 32}, {25, 23, -126, 16}};  // e4m3, bf16

static inline s32 exponent_of(double x, s32 lowest) {
  if (x == 0 || x != x) return LOWEST;
  s32 e = isinf(x) ? 1024 : ilogb(x);
  return e < lowest ? lowest : e;
}
static double cut(double x, s32 exponent, s32 places) { return ldexp(trunc(ldexp(x, places - exponent)), exponent - places); }

// As `sums.add` has it, for one element.
static f32 exact_sum(const Sums *s, const f32 *a, const f32 *b, f32 c) {
  double plain = c, total = -0.0;
  for (int k = 0; k < s->depth; k++) plain += (double)a[k] * b[k];
  if (plain != plain) return quiet_nan();
  if (isinf(plain)) return plain;
  s32 top = exponent_of(c, -126);
  for (int k = 0; k < s->depth; k++) {
    s32 e = exponent_of(a[k], s->min_exponent) + exponent_of(b[k], s->min_exponent);
    if (e > top) top = e;
  }
  if (top < LOWEST) top = LOWEST;
  for (int k = 0; k < s->depth; k++) total += cut((double)a[k] * b[k], top, s->places);
  total += cut(c, top, s->places);
  return (f32)cut(total, exponent_of(total, -126), s->kept);
}

static inline Words larger(Words a, Words b) {
#ifdef __AVX2__
  return (Words)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  Words m = a > b;
  return (a & m) | (b & ~m);
#endif
}
static inline int any(Words m) {
  s32 lanes[8], all = 0;
  memcpy(lanes, &m, 32);
  for (int l = 0; l < 8; l++) all |= lanes[l];
  return all;
}

// Eight elements; what they are made of by k: values and exponents of A and B. False if they need the
// exact way.
static int fast_sums(int kind, const Floats *a, const Words *ea, const Floats *b, const Words *eb, int step, Floats *c) {
  const Sums *s = SUMS + kind;
  Words word = (Words)*c, field = word >> 23 & 255, zero = (word & 0x7fffffff) == 0, top = (field - 127) + ((field == 0) & 1);
  top = (top & ~zero) | (LOWEST & zero);
  for (int k = 0; k < s->depth; k++) top = larger(top, ea[k * step] + eb[k]);
  Words nothing = top <= LOWEST;
  top &= ~nothing;
  if (any((top > FAR) | (top < -FAR) | (nothing & (word < 0)))) return 0;
  Floats scale = (Floats)((127 + s->places - top) << 23);
  Words t[2] = {__builtin_convertvector(*c * scale, Words)};  // each half of K by itself: no overflow
  for (int k = 0; k < s->depth; k++) t[k / 8 & 1] += __builtin_convertvector(a[k * step] * b[k] * scale, Words);
  if (kind == E4M3) {
    *c = (Floats)((Words)__builtin_convertvector(t[0] + t[1], Floats) & ~0x3ff) * (Floats)((127 - s->places + top) << 23);
    return 1;
  }
  Doubles total = __builtin_convertvector(t[0], Doubles) + __builtin_convertvector(t[1], Doubles);
  total = (Doubles)((Longs)total & ~((1ll << 29) - 1));  // 24 bits
  *c = __builtin_convertvector(total, Floats) * (Floats)((127 - s->places + top) << 23);
  return 1;
}

static f32 E4M3_VALUES[256];
static s32 E4M3_EXPONENTS[256];
static void make_tables(void) {
  for (int b = 0; b < 256; b++) {
    int e = b >> 3 & 15, f = b & 7;
    f32 v = (b & 127) == 127 ? NAN : e ? ldexpf(8 + f, e - 10) : ldexpf(f, -9);
    E4M3_VALUES[b] = b > 127 ? -v : v;
    E4M3_EXPONENTS[b] = b & 127 ? (e ? e : 1) - 7 : ZERO;
  }
}

// Where the two halves of row r of a K-major operand with a 128-byte swizzle lie.
static u32 operand_at(u64 descriptor, int r, int half) {
  u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  u32 address = start + r / 8 * stride + r % 8 * 128 + 16 * half;
  return address ^ (address >> 7 & 7) << 4;
}

enum { HAS_NAN = 1, HAS_INFINITY = 2, ALL_ZERO = 4 };  // what 32 bytes of an operand hold

static int decode(const u8 *bytes, int kind, f32 *value, s32 *exponent) {
  s32 nan = 0, infinite = 0, bits = 0;
  if (kind == BF16)
    for (int k = 0; k < 16; k++) {
      s32 word = ((const u16 *)bytes)[k], size = word & 0x7fff, field = size >> 7;
      value[k] = float_of((u32)word << 16);
      exponent[k] = size == 0 ? ZERO : (field ? field : 1) - 127;
      nan |= size > 0x7f80, infinite |= size == 0x7f80, bits |= size;
    }
  else
    for (int k = 0; k < 32; k++) {
      value[k] = E4M3_VALUES[bytes[k]], exponent[k] = E4M3_EXPONENTS[bytes[k]];
      nan |= (bytes[k] & 127) == 127, bits |= bytes[k] & 127;
    }
  return nan * HAS_NAN | infinite * HAS_INFINITY | !bits * ALL_ZERO;
}

static int operand(const Warp *w, u64 descriptor, int r, int kind, f32 *value, s32 *exponent) {
  u8 bytes[32] __attribute__((aligned(32)));
  for (int half = 0; half < 2; half++) memcpy(bytes + 16 * half, w->cta->shared + operand_at(descriptor, r, half), 16);
  return decode(bytes, kind, value, exponent);
}

// 16 rows of A, of registers or by descriptor, times all columns. Lane l of register 4 g + j has row
// l / 4 + 8 (j / 2) and column 8 g + 2 (l % 4) + j % 2. x: kind, columns, rows of the sums, and of A.
static void multiply(Warp *w, const Product *p) {
  f32 A[2][32][4][8], B[2][32][8];  // as the lanes need them, by half and k, by j % 2 and k
  s32 EA[2][32][4][8], EB[2][32][8], exponent[32];
  f32 rows[16][32], columns[8][32];
  const s32 *x = w->code->extra + p->i->x, *sums = x + 2, *left = sums + x[1] / 2;
  int kind = x[0], depth = SUMS[kind].depth, row_is[16], column_is[8];
  if (!E4M3_EXPONENTS[0]) make_tables();
  for (int r = 0; r < 16; r++) {
    if (p->a) row_is[r] = operand(w, p->a, 16 * (w->index % 4) + r, kind, rows[r], exponent);
    else {
      u8 bytes[32];
      for (int q = 0; q < 8; q++)  // words of a row: two registers, four lanes
        memcpy(bytes + 4 * q, row(w, left[r / 8 + q / 4 * 2]) + r % 8 * 4 + q % 4, 4);
      row_is[r] = decode(bytes, kind, rows[r], exponent);
    }
    int odd = row_is[r] & (HAS_NAN | HAS_INFINITY);
    for (int k = 0; k < depth; k++)
      for (int q = 0; q < 4; q++) {
        A[r / 8][k][r % 8 / 2][r % 2 * 4 + q] = odd ? 0 : rows[r][k];
        EA[r / 8][k][r % 8 / 2][r % 2 * 4 + q] = odd ? ZERO : exponent[k];
      }
  }
  for (int g = 0; g < x[1] / 8; g++) {
    int odd[2] = {0};
    for (int c = 0; c < 8; c++) {
      column_is[c] = operand(w, p->b, 8 * g + c, kind, columns[c], exponent);
      odd[c % 2] |= column_is[c] & (HAS_NAN | HAS_INFINITY);
      for (int k = 0; k < depth; k++)
        for (int q = c / 2; q < 8; q += 4) B[c % 2][k][q] = columns[c][k], EB[c % 2][k][q] = exponent[k];
    }
    for (int j = 0; j < 4; j++)
      for (int v = 0; v < 4; v++) {
        f32 *sum = (f32 *)row(w, sums[4 * g + j]) + 8 * v;
        int r = 8 * (j / 2) + 2 * v, either = row_is[r] | row_is[r + 1] | odd[j % 2];
        Floats total = {0}, before;
        if (p->keep) memcpy(&total, sum, 32);
        before = total;
        Words c = (Words)total, wild = (c >> 23 & 255) == 255;
        int odd_sums = any(wild);
        if (!odd[j % 2] && row_is[r] & row_is[r + 1] & ALL_ZERO && !odd_sums && !any(c == -0x7fffffff - 1)) {
          c &= kind == E4M3 ? ~0x3ff : ~0;  // nothing is added, as to most rows that pad a tile
          memcpy(sum, &c, 32);
          continue;
        }
        total = (Floats)(c & ~wild);
        int fast = !odd[j % 2] && fast_sums(kind, (Floats *)A[j / 2][0][v], (Words *)EA[j / 2][0][v],
                                            (Floats *)B[j % 2], (Words *)EB[j % 2], 4, &total);
        if (!fast || odd_sums || (row_is[r] | row_is[r + 1]) & (HAS_NAN | HAS_INFINITY))
          for (int l = 0; l < 8; l++) {
            int mine = r + l / 4, column = 2 * (l % 4) + j % 2, is = row_is[mine] | column_is[column];
            if (is & HAS_NAN || before[l] != before[l]) total[l] = quiet_nan();
            else if (!fast || is & HAS_INFINITY || isinf(before[l]))
              total[l] = exact_sum(SUMS + kind, rows[mine], columns[column], before[l]);
          }
        memcpy(sum, &total, 32);
      }
  }
}
