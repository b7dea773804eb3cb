// The engine: executes decoded instructions of a warp until its turn is over or it must wait.
// `cases.h` holds the operations of lanes, made from the table in `alu`; `numbers.h` their numbers.
#include "machine.h"
#include "numbers.h"

static inline u64 drawn(Machine *m) {  // xorshift
  m->random ^= m->random >> 12, m->random ^= m->random << 25, m->random ^= m->random >> 27;
  return m->random * 2685821657736338717u >> 33;
}

static inline const u32 *row(const Warp *w, s32 number) {
  return number >= 0 ? w->rows + 32 * (long)number : w->code->constants + 32 * (long)(-1 - number);
}
static inline u64 value(const Warp *w, s32 number, int wide, int lane) {
  return wide ? ((const u64 *)row(w, number))[lane] : row(w, number)[lane];
}
static inline u32 where(const Warp *w, const Instruction *i) {
  return w->code->number << 20 | (u32)(i - w->code->instructions);
}
static int fail(Warp *w, int fault) { return w->fault = fault, FAULT; }

// Lanes that come to where they meet the others wait there for them.
static inline void go(Warp *w, s32 pc) {
  while (pc == w->rejoin) {
    Frame *f = &w->frames[--w->depth];
    pc = f->join, w->mask = f->mask, w->rejoin = f->rejoin;
  }
  w->pc = pc;
}

static int branch(Warp *w, u32 taken, s32 target, s32 following, s32 join) {
  u32 stay = w->mask & ~taken;
  if (!stay) return go(w, target), RAN;
  if (!taken) return go(w, following), RAN;
  if (w->depth + 2 > FRAMES) return fail(w, TOO_DEEP);
  if (join != w->rejoin) {
    w->frames[w->depth++] = (Frame){join, w->mask, w->rejoin};
    w->rejoin = join;
  }
  if (target == join) return w->mask = stay, go(w, following), RAN;
  if (following != join) w->frames[w->depth++] = (Frame){following, stay, join};
  w->mask = taken;
  return go(w, target), RAN;
}

static Segment *segment_of(Machine *m, s32 *last, u64 address, u64 bytes) {
  Segment *s = m->segments + *last;
  if (address >= s->base && address + bytes <= s->end) return s;
  for (s32 n = 0; n < m->num_segments; n++) {
    s = m->segments + n;
    if (address >= s->base && address + bytes <= s->end) return *last = n, s;
  }
  return NULL;
}

// The bytes at an address, or null.
static u8 *find(Warp *w, int space, u64 address, u32 bytes) {
  w->address = address;
  if (space == SHARED) {
    if (address >= BASE && address + bytes <= w->cta->launch->shared_end) return w->cta->shared + address;
    return fail(w, UNMAPPED), NULL;
  }
  Segment *s = segment_of(w->machine, &w->segment, address, bytes);
  if (!s) return fail(w, UNMAPPED), NULL;
  if (s->rank >= 0 && s->rank != w->cta->rank) w->machine->remote += bytes;
  return (u8 *)address;
}

static inline u64 place(const Warp *w, s32 number, int wide, s32 offset, int lane) {
  u64 base = value(w, number, wide, lane);
  return wide ? base + (s64)offset : (u32)(base + offset);
}

// After a store: whether somebody watches what it wrote.
static int watched(Warp *w, u32 m, const u64 *address, u32 bytes) {
  Machine *machine = w->machine;
  if (!machine->watch_high) return RAN;
  for (u32 rest = m; rest; rest &= rest - 1) {
    u64 at = address[__builtin_ctz(rest)];
    if (at < machine->watch_high && at + bytes > machine->watch_low) return w->what = w->pc, go(w, w->pc + 1), STOPPED;
  }
  return RAN;
}

static void let_dependents(Cta *c);
static int wait_for_launch(Warp *w);
static u32 operand_at(u64 descriptor, int r, int half);
#include "order.c"
#include "copies.c"

#define LOAD(type, wider) EACH(type v; memcpy(&v, at[l] + k * sizeof v, sizeof v); ((wider *)pd)[l] = v)
#define STORE(type, wider) EACH(type v = (type)((const wider *)pd)[l]; memcpy(to[l] + k * sizeof v, &v, sizeof v))

// The same value in the same place again: the warp waits for somebody.
static int polled(Warp *w, s32 pc, u64 hash) {
  int p = 0;
  while (p < w->num_polls && w->polls[p].pc != pc) p++;
  if (p == POLLS) return RAN;
  int same = p < w->num_polls && w->polls[p].hash == hash;
  if (p == w->num_polls) w->num_polls++;
  w->polls[p].pc = pc, w->polls[p].hash = hash, w->polls[p].address = w->address;
  return same ? POLLED : RAN;
}

// ld and st. x: space, bytes, count, signed, wide registers, rows.
static int access(Warp *w, const Instruction *i, u32 m, int loads) {
  const s32 *x = w->code->extra + i->x;
  int size = x[1], all = size * x[2], is_signed = x[3], wide = x[4], ordered = w->machine->settings.ordered;
  u64 address[32], hash = 1469598103934665603u;
  u8 *at[32], **to = at, *held[32];
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    address[l] = place(w, i->a, i->b, i->n, l);
    if (address[l] & (all - 1)) return w->address = address[l], fail(w, MISALIGNED);
    if (!(at[l] = find(w, x[0], address[l], all))) return FAULT;
  }
  if (ordered) {
    before_access(w, i, m, x[0], address, all, loads, !loads);
    if (!loads && hold(w, i, m, at, all, held)) to = held;
  }
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
      if (i->flags & STRONG) EACH(hash = (hash ^ pd[l] ^ address[l]) * 1099511628211u)
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
  if (loads) return i->flags & STRONG ? polled(w, w->pc, hash) : RAN;
  w->num_polls = 0, w->wrote = 1;
  return watched(w, m, address, all);
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

// atom and red, lane by lane. x: space, bytes, kind, row of the second operand, whether it reads.
static int atomic(Warp *w, const Instruction *i, u32 m) {
  const s32 *x = w->code->extra + i->x;
  int size = x[1], wide = size == 8;
  u64 address[32];
  w->num_polls = 0, w->wrote = 1;
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    address[l] = place(w, i->a, i->b, i->n, l);
    if (address[l] & (size - 1)) return w->address = address[l], fail(w, MISALIGNED);
    u8 *at = find(w, x[0], address[l], size);
    if (!at) return FAULT;
    if (w->machine->settings.ordered) before_access(w, i, 1u << l, x[0], address, size, x[4], 1);
    u64 old = 0, new;
    memcpy(&old, at, size);
    new = combined(x[2], old, value(w, i->c, wide, l), value(w, x[3], wide, l), size);
    memcpy(at, &new, size);
    if (i->d >= 0 && wide) ((u64 *)row(w, i->d))[l] = old;
    else if (i->d >= 0) ((u32 *)row(w, i->d))[l] = old;
  }
  return watched(w, m, address, size);
}

// Modes: idx, up, down, bfly. a: value, b: lane or distance, c: clamp and segment.
static void shuffle(Warp *w, const Instruction *i, int mode, u32 m) {
  const u32 *pa = row(w, i->a), *pb = row(w, i->b);
  u32 *pd = (u32 *)row(w, i->d), packed = row(w, i->c)[__builtin_ctz(m)], valid = 0, moved[32];
  int segment = packed >> 8 & 31, clamp = packed & 31;
  for (int l = 0; l < 32; l++) {
    int low = l & segment, top = low | (clamp & ~segment), b = pb[l], from, good;
    if (mode == 0) from = low | (b & 31 & ~segment), good = from <= top;
    else if (mode == 1) from = l - b, good = from >= top;
    else from = mode == 2 ? l + b : (l ^ b), good = from <= top;
    moved[l] = pa[good ? from & 31 : l];
    valid |= (u32)good << l;
  }
  EACH(pd[l] = moved[l])
  if (i->n >= 0) w->predicates[i->n] = (w->predicates[i->n] & ~m) | (valid & m);
}

// The largest or smallest of the lanes. kind: max.s32, min.s32, max.u32, min.u32.
static u32 reduce(const u32 *a, int kind, u32 m) {
  const u32 sign = kind < 2 ? 1u << 31 : 0;
  u32 best = a[__builtin_ctz(m)];
  EACH(if (kind & 1 ? (a[l] ^ sign) < (best ^ sign) : (a[l] ^ sign) > (best ^ sign)) best = a[l])
  return best;
}

// ldmatrix and stmatrix: rows of 8 x 8 matrices of 16 bits. x: matrices, transposed, rows; lane 8 k + r
// has the address of row r of matrix k.
static int matrices(Warp *w, const Instruction *i, int loads) {
  const s32 *x = w->code->extra + i->x;
  u64 address[32];
  u16 *at[32];
  if (!loads) w->num_polls = 0, w->wrote = 1;
  if (w->num_held) flush_held(w, NULL);
  for (int l = 0; l < 8 * x[0]; l++) {
    address[l] = place(w, i->a, i->b, i->n, l);
    if (!(at[l] = (u16 *)find(w, SHARED, address[l], 16))) return FAULT;
    if (address[l] & 15) return fail(w, MISALIGNED);
    if (w->machine->settings.ordered) before_access(w, i, 1u << l, SHARED, address, 16, loads, !loads);
  }
  for (int l = 0; l < 8 * x[0]; l++)
    for (int c = 0; c < 8; c++) {
      int high = x[1] ? l % 8 : c, low = x[1] ? c : l % 8;  // element (low, high) of what lanes hold
      u16 *held = (u16 *)(row(w, x[2 + l / 8]) + 4 * low) + high;
      if (loads) *held = at[l][c];
      else at[l][c] = *held;
    }
  return RAN;
}

// Before an instruction that uses registers of products. x: how many of them it writes, uses; rows.
static int use_operands(Warp *w, const s32 *x) {
  for (s32 k = 0; k < x[1]; k++) {
    Use *u = w->uses + x[2 + k];
    if (u->summed > w->complete || (k < x[0] && u->read > w->complete)) return fail(w, IN_FLIGHT);
    u->touched = w->fences;
  }
  return RAN;
}

static int execute(Warp *w, s32 budget) {
  s32 done = 0;
  int status = RAN;
  const Instruction *code = w->code->instructions;
  Machine *machine = w->machine;
  for (; done < budget; done++) {
    const s32 at = w->pc;
    const Instruction *i = code + at;
    u32 m = w->mask;
    if (i->guard >= 0) m &= w->predicates[i->guard] ^ (i->flags & NEGATED ? ~0u : 0);
    if (i->flags & STOPS) {
      if (machine->stopped != w) { machine->stopped = w, status = STOPPED; break; }
      machine->stopped = NULL;
    }
    if (i->op == OP_bra) {
      if (i->guard < 0) go(w, i->x);
      else if ((status = branch(w, m, i->x, w->pc + 1, i->n))) break;
      continue;
    }
    if (m) {
      const u32 *pa = row(w, i->a), *pb = row(w, i->b), *pc = row(w, i->c);
      u32 *pd = (u32 *)row(w, i->d);
      if (i->flags & USES_OPERANDS && w->uses && (status = use_operands(w, w->code->extra + w->code->uses[at]))) break;
      if (i->op >= OP_shfl_idx && i->op <= OP_elect && m != row(w, i->x)[__builtin_ctz(m)]) {
        status = fail(w, DIVERGENT);
        break;
      }
      if (i->op >= OP_warp_sync && m != ~0u) {  // these are for whole warps
        status = fail(w, DIVERGENT);
        break;
      }
      switch (i->op) {
#include "cases.h"
        case OP_nop: break;
        case OP_ret: status = w->depth ? fail(w, DIVERGENT) : ENDED; break;
        case OP_param: {
          u64 v = 0;
          memcpy(&v, w->cta->launch->parameters + i->n, i->x ? 8 : 4);
          if (i->x) OUT_u64(v) else OUT_u32(v)
          break;
        }
        case OP_timer: { u64 v = machine->time + done; OUT_u64(v) break; }
        case OP_shfl_idx: case OP_shfl_up: case OP_shfl_down: case OP_shfl_bfly:
          shuffle(w, i, i->op - OP_shfl_idx, m);
          break;
        case OP_vote_ballot: { u32 v = w->predicates[i->a] & m; OUT_u32(v) break; }
        case OP_vote_any: OUT_mask(w->predicates[i->a] & m ? ~0u : 0) break;
        case OP_vote_all: OUT_mask((w->predicates[i->a] & m) == m ? ~0u : 0) break;
        case OP_redux_max_s: case OP_redux_min_s: case OP_redux_max_u: case OP_redux_min_u: {
          u32 v = reduce(pa, i->op - OP_redux_max_s, m);
          OUT_u32(v)
          break;
        }
        case OP_elect: {
          u32 first = __builtin_ctz(m);
          if (i->d >= 0) { OUT_u32(first) }
          w->predicates[i->n] = (w->predicates[i->n] & ~m) | (1u << first);
          break;
        }
        case OP_ld: status = access(w, i, m, 1); break;
        case OP_st: status = access(w, i, m, 0); break;
        case OP_atom: status = atomic(w, i, m); break;
        case OP_sleep: status = PAUSED; break;
        case OP_fence: fence(w, i, m); break;
        case OP_fence_proxy: proxy_fence(w, i, m); break;
        case OP_launch_wait: status = wait_for_launch(w); break;
        case OP_launch_let: let_dependents(w->cta); break;
        case OP_mbarrier_init: case OP_mbarrier_arrive: case OP_mbarrier_expect:
          status = mbarrier(w, i, m);
          break;
        case OP_mbarrier_try: case OP_mbarrier_test: status = mbarrier_wait(w, i, m); break;
        case OP_load_bulk: case OP_load_tensor: status = load(w, i, m); break;
        case OP_store_bulk: status = store(w, i, m); break;
        case OP_stores_commit: w->stores_open++; break;
        case OP_stores_wait: finish_stores(w, m, w->stores_open - i->n); break;
        case OP_warp_sync: warp_sync(w); break;
        case OP_stmatrix: case OP_ldmatrix: status = matrices(w, i, i->op == OP_ldmatrix); break;
        case OP_bar_sync: case OP_bar_arrive: status = meet(w, i); break;
        case OP_mma: status = product(w, i); break;
        case OP_mma_fence: w->fences++; break;
        case OP_mma_commit: w->products_open++; break;
        case OP_mma_wait: finish_products(w, w->products_open - i->n); break;
      }
      if (w->code->seen) w->code->seen[at].address = w->address, w->code->seen[at].warps |= 1ull << w->index;
      if (status >= BLOCKED) break;
    }
    go(w, w->pc + 1);
    if (status) { done++; break; }  // it polled or paused
  }
  w->count += done;
  return status;
}

#include "schedule.c"
