// The engine: executes decoded instructions of one warp until it has done enough, needs the machine
// or cannot go on. `core.py` describes the structures to Python; `cases.h` holds the operations of
// lanes, made from the table in `alu`.
#include "lanes.h"

enum { RAN, SERVICE, ENDED, FAULT, POLLED };
enum { NEGATED = 1, TOUCHES_SUMS = 2, STRONG = 4 };
enum { GLOBAL, SHARED };
enum { UNMAPPED = 1, MISALIGNED, DIVERGENT, TOO_DEEP };
enum { BASE = 1024, FRAMES = 32, POLLS = 8 };

typedef struct { u16 op, flags; s32 guard, d, a, b, c, n, x; } Instruction;
typedef struct { s32 join; u32 mask; s32 rejoin; } Frame;
typedef struct { u64 base, end; s32 rank; s32 readonly; } Segment;
typedef struct { Segment *segments; s32 num_segments; s32 ordered; u64 time; } World;
typedef struct {
  World *world;
  const Instruction *code;
  const s32 *extra;
  const u32 *constants;
  u32 *rows, *predicates;
  u8 *shared;
  const u8 *parameters;
  u32 shared_end;
  s32 rank, pc, rejoin, depth;
  u32 mask, active;  // lanes that run; lanes of the instruction at which it stopped
  s32 fault, forced, touched, segment, num_polls;
  u64 address, count, remote;  // of a fault; instructions; bytes that crossed ranks
  struct { s32 pc; u64 hash; } polls[POLLS];
  Frame frames[FRAMES];
} Warp;

static inline const u32 *row(const Warp *w, s32 number) {
  return number >= 0 ? w->rows + 32 * (long)number : w->constants + 32 * (long)(-1 - number);
}

// Lanes that come to where they meet the others wait there for them.
static inline void go(Warp *w, s32 pc) {
  while (pc == w->rejoin) {
    Frame *f = &w->frames[--w->depth];
    pc = f->join, w->mask = f->mask, w->rejoin = f->rejoin;
  }
  w->pc = pc;
}

void advance(Warp *w) { go(w, w->pc + 1); }

static int branch(Warp *w, u32 taken, s32 target, s32 following, s32 join) {
  u32 stay = w->mask & ~taken;
  if (!stay) return go(w, target), 0;
  if (!taken) return go(w, following), 0;
  if (w->depth + 2 > FRAMES) return TOO_DEEP;
  if (join != w->rejoin) {
    w->frames[w->depth++] = (Frame){join, w->mask, w->rejoin};
    w->rejoin = join;
  }
  if (target == join) return w->mask = stay, go(w, following), 0;
  if (following != join) w->frames[w->depth++] = (Frame){following, stay, join};
  w->mask = taken;
  return go(w, target), 0;
}

// The bytes at an address, or null.
static u8 *find(Warp *w, int space, u64 address, u32 size) {
  w->address = address;
  if (address & (size - 1)) return w->fault = MISALIGNED, NULL;
  if (space == SHARED) {
    if (address < BASE || address + size > w->shared_end) return w->fault = UNMAPPED, NULL;
    return w->shared + address;
  }
  Segment *s = w->world->segments + w->segment;
  if (address < s->base || address + size > s->end) {
    int n = 0;
    while (n < w->world->num_segments &&
           (address < w->world->segments[n].base || address + size > w->world->segments[n].end)) n++;
    if (n == w->world->num_segments) return w->fault = UNMAPPED, NULL;
    s = w->world->segments + (w->segment = n);
  }
  if (s->rank >= 0 && s->rank != w->rank) w->remote += size;
  return (u8 *)address;
}

static inline u64 address_of(const u32 *pa, int wide, s32 offset, int l) {
  return wide ? ((const u64 *)pa)[l] + (s64)offset : (u32)(pa[l] + offset);
}

#define LOAD(type, wider) EACH(type v; memcpy(&v, at[l] + k * sizeof v, sizeof v); ((wider *)pd)[l] = v)
#define STORE(type, wider) EACH(type v = (type)((const wider *)pd)[l]; memcpy(at[l] + k * sizeof v, &v, sizeof v))

// ld and st. x: space, bytes, count, signed, wide registers, rows.
static int access(Warp *w, const Instruction *i, u32 m, int loads) {
  const s32 *x = w->extra + i->x;
  const u32 *pa = row(w, i->a);
  int size = x[1], is_signed = x[3], wide = x[4];
  u8 *at[32];
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    at[l] = find(w, x[0], address_of(pa, i->b, i->n, l), size * x[2]);
    if (!at[l]) return FAULT;
  }
  u64 hash = 1469598103934665603u;
  for (int k = 0; k < x[2]; k++) {
    u32 *pd = (u32 *)row(w, x[5 + k]);
    if (loads) {
      switch (size * 4 + is_signed * 2 + wide) {
        case 4: LOAD(u8, u32) break;
        case 5: LOAD(u8, u64) break;
        case 6: LOAD(s8, s32) break;
        case 7: LOAD(s8, s64) break;
        case 8: LOAD(u16, u32) break;
        case 9: LOAD(u16, u64) break;
        case 10: LOAD(s16, s32) break;
        case 11: LOAD(s16, s64) break;
        case 16: case 18: LOAD(u32, u32) break;
        case 17: LOAD(u32, u64) break;
        case 19: LOAD(s32, s64) break;
        default: LOAD(u64, u64)
      }
      if (i->flags & STRONG) EACH(hash = (hash ^ pd[l] ^ (u64)at[l]) * 1099511628211u)
    } else {
      switch (size * 2 + wide) {
        case 2: STORE(u8, u32) break;
        case 3: STORE(u8, u64) break;
        case 4: STORE(u16, u32) break;
        case 5: STORE(u16, u64) break;
        case 8: STORE(u32, u32) break;
        case 9: STORE(u32, u64) break;
        default: STORE(u64, u64)
      }
    }
  }
  if (!loads) return w->num_polls = 0, RAN;
  if (!(i->flags & STRONG)) return RAN;
  int pc = i - w->code;  // the same value in the same place again: it waits for somebody
  for (int p = 0; p < w->num_polls; p++)
    if (w->polls[p].pc == pc) {
      int same = w->polls[p].hash == hash;
      w->polls[p].hash = hash;
      return same ? POLLED : RAN;
    }
  if (w->num_polls < POLLS) w->polls[w->num_polls].pc = pc, w->polls[w->num_polls++].hash = hash;
  return RAN;
}

static u64 combined(int kind, u64 old, u64 x, u64 y, int size) {
  s64 a = size == 4 ? (s32)old : (s64)old, b = size == 4 ? (s32)x : (s64)x;
  switch (kind) {
    case 0: return old + x;
    case 1: return x;
    case 2: return old == x ? y : old;
    case 3: return old & x;
    case 4: return old | x;
    case 5: return old ^ x;
    case 6: return old < x ? old : x;
    case 7: return old > x ? old : x;
    case 8: return a < b ? old : x;
    default: return a > b ? old : x;
  }
}

// atom and red, lane by lane. x: space, bytes, kind, row of the second operand.
static int atomic(Warp *w, const Instruction *i, u32 m) {
  const s32 *x = w->extra + i->x;
  const u32 *pa = row(w, i->a), *pc = row(w, i->c), *py = row(w, x[3]);
  int size = x[1];
  w->num_polls = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    u8 *at = find(w, x[0], address_of(pa, i->b, i->n, l), size);
    if (!at) return FAULT;
    u64 old = 0, new;
    memcpy(&old, at, size);
    if (size == 4) new = combined(x[2], old, pc[l], py[l], 4);
    else new = combined(x[2], old, ((const u64 *)pc)[l], ((const u64 *)py)[l], 8);
    memcpy(at, &new, size);
    if (i->d >= 0) {
      if (size == 4) w->rows[32 * (long)i->d + l] = old;
      else ((u64 *)(w->rows + 32 * (long)i->d))[l] = old;
    }
  }
  return RAN;
}

// Modes: idx, up, down, bfly. a: value, b: lane or distance, c: clamp and segment.
static void shuffle(Warp *w, const Instruction *i, int mode, u32 m) {
  const u32 *pa = row(w, i->a), *pb = row(w, i->b);
  u32 *pd = (u32 *)row(w, i->d), packed = row(w, i->c)[__builtin_ctz(m)], valid = 0, value[32];
  int segment = packed >> 8 & 31, clamp = packed & 31;
  for (int l = 0; l < 32; l++) {
    int low = l & segment, top = low | (clamp & ~segment), b = pb[l], from, good;
    if (mode == 0) from = low | (b & 31 & ~segment), good = from <= top;
    else if (mode == 1) from = l - b, good = from >= top;
    else from = mode == 2 ? l + b : (l ^ b), good = from <= top;
    value[l] = pa[good ? from & 31 : l];
    valid |= (u32)good << l;
  }
  EACH(pd[l] = value[l])
  if (i->n >= 0) w->predicates[i->n] = (w->predicates[i->n] & ~m) | (valid & m);
}

int run(Warp *w, s32 budget) {
  s32 done = 0;
  int status = RAN;
  for (; done < budget; done++) {
    const Instruction *i = w->code + w->pc;
    u32 m = w->mask;
    if (i->guard >= 0) m &= w->predicates[i->guard] ^ (i->flags & NEGATED ? ~0u : 0);
    if (i->op == OP_bra) {
      if (i->guard < 0) go(w, i->x);
      else if ((w->fault = branch(w, m, i->x, w->pc + 1, i->n))) { status = FAULT; break; }
      continue;
    }
    if (m) {
      const u32 *pa = row(w, i->a), *pb = row(w, i->b), *pc = row(w, i->c);
      u32 *pd = (u32 *)row(w, i->d);
      if (i->flags & TOUCHES_SUMS) w->touched = 1;
      if (i->op >= OP_shfl_idx && i->op <= OP_elect && m != row(w, i->x)[__builtin_ctz(m)]) {
        w->fault = DIVERGENT, status = FAULT;
        break;
      }
      switch (i->op) {
#include "cases.h"
        case OP_nop: break;
        case OP_ret:
          status = w->depth ? FAULT : ENDED;
          w->fault = DIVERGENT;
          goto stop;
        case OP_param: {
          u64 v = 0;
          memcpy(&v, w->parameters + i->n, i->x ? 8 : 4);
          if (i->x) OUT_u64(v) else OUT_u32(v)
          break;
        }
        case OP_timer: { u64 v = w->world->time + done; OUT_u64(v) break; }
        case OP_shfl_idx: case OP_shfl_up: case OP_shfl_down: case OP_shfl_bfly:
          shuffle(w, i, i->op - OP_shfl_idx, m);
          break;
        case OP_vote_ballot: { u32 v = w->predicates[i->a] & m; OUT_u32(v) break; }
        case OP_vote_any: OUT_mask(w->predicates[i->a] & m ? ~0u : 0) break;
        case OP_vote_all: OUT_mask((w->predicates[i->a] & m) == m ? ~0u : 0) break;
        case OP_elect: {
          u32 first = __builtin_ctz(m);
          if (i->d >= 0) OUT_u32(first)
          w->predicates[i->n] = (w->predicates[i->n] & ~m) | (1u << first);
          break;
        }
        case OP_ld: case OP_st: case OP_atom:
          if (i->flags & STRONG && w->world->ordered && !w->forced) {
            w->active = m, status = SERVICE;
            goto stop;
          }
          status = i->op == OP_atom ? atomic(w, i, m) : access(w, i, m, i->op == OP_ld);
          if (status == FAULT) goto stop;
          if (status == POLLED) { go(w, w->pc + 1), done++; goto stop; }
          break;
        default:
          w->active = m, status = SERVICE;
          goto stop;
      }
    }
    go(w, w->pc + 1);
  }
stop:
  w->count += done;
  return status;
}

static const f32 *values_of(int kind) {  // of an e4m3 byte
  static f32 table[256];
  if (!table[1])
    for (int b = 0; b < 256; b++) {
      int e = b >> 3 & 15, f = b & 7;
      f32 v = (b & 127) == 127 ? NAN : e ? ldexpf(8 + f, e - 10) : ldexpf(f, -9);
      table[b] = b > 127 ? -v : v;
    }
  return table;
}

static inline f32 item(const u8 *p, int kind) {
  return kind ? float_of((u32)(p[0] | p[1] << 8) << 16) : values_of(kind)[*p];
}

// 32 bytes of row r of a K-major operand with a 128-byte swizzle, as values.
static void operand(const Warp *w, u64 descriptor, int r, int kind, f32 *out) {
  u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  for (int half = 0; half < 2; half++) {
    u32 ad = start + r / 8 * stride + r % 8 * 128 + 16 * half;
    const u8 *p = w->shared + (ad ^ (ad >> 7 & 7) << 4);
    for (int b = 0; b < 16; b += 1 + kind) *out++ = item(p + b, kind);
  }
}

// One warp's share of wgmma: 16 rows of A (of `left`, rows of registers, or by descriptor) times n
// columns. Kind 0: e4m3, 1: bf16. Sums in float32, in the order of K.
void multiply(Warp *w, const s32 *sums, const s32 *left, u64 a, u64 b, s32 n, s32 keep, s32 kind, s32 first) {
  static f32 A[16][32], B[32][256], C[16][256];
  int depth = 32 >> kind;
  f32 line[32];
  for (int r = 0; r < 16; r++) {
    if (!left) operand(w, a, first + r, kind, A[r]);
    else
      for (int k = 0; k < depth; k++) {
        int byte = k << kind, l = r % 8 * 4 + byte % 16 / 4;
        const u8 *p = (const u8 *)(row(w, left[r / 8 + byte / 16 * 2]) + l) + byte % 4;
        A[r][k] = item(p, kind);
      }
  }
  for (int c = 0; c < n; c++) {
    operand(w, b, c, kind, line);
    for (int k = 0; k < depth; k++) B[k][c] = line[k];
  }
#define SUM ((f32 *)row(w, sums[j]))[l]
#define PLACE C[l / 4 + 8 * (j >> 1 & 1)][8 * (j >> 2) + 2 * (l % 4) + (j & 1)]
  for (int j = 0; j < n / 2; j++)
    for (int l = 0; l < 32; l++) PLACE = keep ? SUM : 0;
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < depth; k++)
      for (int c = 0; c < n; c++) C[r][c] += A[r][k] * B[k][c];
  for (int j = 0; j < n / 2; j++)
    for (int l = 0; l < 32; l++) SUM = PLACE;
}
