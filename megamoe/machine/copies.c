// Barriers of a CTA, asynchronous copies and groups of products.
//
// Loads complete on an mbarrier, at their issue or later as the policy says; bulk stores and products
// belong to groups of their warp, and read shared memory at their issue or at the wait for the group.

static void wake(Warp *w) {
  w->blocked = FREE;
  w->machine->next[w->machine->num_next++] = w;
}
static int block(Warp *w, int kind, u32 what) { return w->blocked = kind, w->what = what, BLOCKED; }

static void wake_all(Cta *c, u64 *waiting) {
  for (; *waiting; *waiting &= *waiting - 1) wake(c->warps + __builtin_ctzll(*waiting));
}

// mbarriers

static Barrier *barrier_at(Warp *w, u64 address) {
  w->address = address;
  u32 number = address >= BASE && address < w->cta->launch->shared_end ? w->cta->barrier_at[address / 8] : 0;
  if (address & 7 || !number) return fail(w, NO_BARRIER), NULL;
  return w->cta->barriers + number - 1;
}

static int settle(Cta *c, Barrier *b) {
  if (b->pending < 0) return MANY_ARRIVALS;
  if (b->pending || b->bytes) return NO_FAULT;
  b->pending = b->count;
  b->flips++;
  if (c->warps->machine->settings.ordered) phase_done(c->warps->machine, b);
  wake_all(c, &b->waiting);
  return NO_FAULT;
}

// init, arrive, arrive.expect_tx; c: row of the count or of the bytes.
static int mbarrier(Warp *w, const Instruction *i, u32 m) {
  w->num_polls = 0, w->wrote = 1;
  int ordered = w->machine->settings.ordered;
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    u64 address = place(w, i->a, i->b, i->n, l);
    u32 amount = value(w, i->c, 0, l);
    Cta *c = w->cta;
    if (i->op == OP_mbarrier_init) {
      if (!find(w, SHARED, address, 8) || address & 7 || c->num_barriers == MAX_BARRIERS) return fail(w, NO_BARRIER);
      c->barrier_at[address / 8] = ++c->num_barriers;
      Barrier *b = c->barriers + c->num_barriers - 1;
      b->address = address, b->count = b->pending = amount;
      b->agent = w->agent - 4 * w->index + 4 * c->num_warps + c->num_barriers - 1;
      continue;
    }
    Barrier *b = barrier_at(w, address);
    if (!b) return FAULT;
    if (ordered && !(i->flags & RELAXED)) arrived(w, l, b);
    if (i->op == OP_mbarrier_expect) b->bytes += amount, b->pending--;
    else b->pending -= amount;
    int fault = settle(c, b);
    if (fault) return fail(w, fault);
  }
  if (ordered && i->op != OP_mbarrier_init) tick(w, m);
  return RAN;
}

// try_wait and test_wait for a parity; c: its row, d: a predicate.
static int mbarrier_wait(Warp *w, const Instruction *i, u32 m) {
  int l = __builtin_ctz(m);
  Barrier *b = barrier_at(w, place(w, i->a, i->b, i->n, l));
  if (!b) return FAULT;
  u32 passed = (b->flips & 1) != value(w, i->c, 0, l);
  if (!passed && i->op == OP_mbarrier_try && !w->timed_out) {
    b->waiting |= 1ull << w->index;
    return block(w, ON_MBARRIER, b->address);
  }
  w->timed_out = 0;
  OUT_mask(passed ? ~0u : 0)
  if (passed && w->machine->settings.ordered && !(i->flags & RELAXED)) passed_phase(w, m, b);
  return passed ? RAN : PAUSED;
}

// bar.sync and bar.arrive. n: number, x: threads or 0.
static int meet(Warp *w, const Instruction *i) {
  Cta *c = w->cta;
  Meeting *meeting = c->meetings + (i->n & 15);
  u32 threads = i->x ? i->x : w->code->threads;
  w->num_polls = 0, w->wrote = 1;
  meeting->threads += 32;
  if (w->machine->settings.ordered) came(w, meeting);
  if (meeting->threads > threads) return fail(w, MANY_THREADS);
  if (i->op == OP_bar_sync) meeting->waiting |= 1ull << w->index;
  if (meeting->threads == threads) {
    if (w->machine->settings.ordered) met(c, meeting);
    meeting->threads = 0;
    meeting->waiting &= ~(1ull << w->index);
    wake_all(c, &meeting->waiting);
  } else if (i->op == OP_bar_sync) {
    go(w, w->pc + 1);
    return block(w, ON_BARRIER, i->n);
  }
  return RAN;
}

// Loads

static void read_box(Machine *m, const Copy *c) {
  const Map *map = c->map;
  u8 *shared = c->cta->shared;
  s32 last = 0, k[5] = {0};
  s64 low = c->at[0] < 0 ? -c->at[0] : 0, high = map->size[0] - c->at[0];
  if (high > map->box[0]) high = map->box[0];
  for (u32 target = c->target; target < c->target + c->bytes; target += 128) {
    s64 offset = c->at[0] * map->stride[0];
    int inside = high > low;
    for (int d = 1; d < map->rank; d++) {
      s64 at = (s64)c->at[d] + k[d];
      inside &= at >= 0 && at < map->size[d];
      offset += at * map->stride[d];
    }
    for (int d = 1; d < map->rank && ++k[d] == map->box[d]; d++) k[d] = 0;
    u8 line[128] = {0};
    if (inside) {
      u64 source = map->base + offset + low * map->item;
      u32 bytes = (high - low) * map->item;
      memcpy(line + low * map->item, (const u8 *)source, bytes);
      if (m->settings.ordered) copied(m, c, GLOBAL, source, bytes, 0, &last);
    }
    for (int chunk = 0; chunk < 8; chunk++)  // the 128-byte swizzle
      memcpy(shared + target + ((chunk ^ (target >> 7 & 7)) << 4), line + 16 * chunk, 16);
  }
}

static int perform(Machine *m, Copy *c) {
  s32 last = 0;
  if (c->map) read_box(m, c);
  else {
    memcpy(c->cta->shared + c->target, (const u8 *)c->source, c->bytes);
    if (m->settings.ordered) copied(m, c, GLOBAL, c->source, c->bytes, 0, &last);
  }
  if (m->settings.ordered) {
    copied(m, c, SHARED, c->target, c->bytes, 1, &last);
    landed(m, c);
  }
  c->barrier->bytes -= c->bytes;
  return settle(c->cta, c->barrier);
}

// x, bulk: row, width and offset of the source, row of the bytes; tensor: row of the map, rank, rows of
// the coordinates; both then: row, width and offset of the mbarrier.
static int load(Warp *w, const Instruction *i, u32 m) {
  Machine *machine = w->machine;
  const s32 *x = w->code->extra + i->x;
  w->num_polls = 0, w->wrote = 1;
  if (i->op == OP_load_tensor && m & (m - 1)) return fail(w, MANY_LANES);
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    Copy c = {w->cta, .target = place(w, i->a, i->b, i->n, l), .where = where(w, i)};
    const s32 *b;
    if (i->op == OP_load_bulk) {
      c.source = place(w, x[0], x[1], x[2], l), c.bytes = value(w, x[3], 0, l), b = x + 4;
      if ((c.source | c.bytes | c.target) & 15) return w->address = c.source, fail(w, NOT_16);
      if (!find(w, GLOBAL, c.source, c.bytes)) return FAULT;
    } else {
      s32 offset = value(w, x[0], 1, l) - PARAM_BASE;
      for (s32 n = 0; n < w->cta->launch->num_maps; n++)
        if (w->cta->launch->maps[n].offset == offset) c.map = w->cta->launch->maps + n;
      if (!c.map || c.map->rank != x[1]) return fail(w, NO_MAP);
      c.bytes = 128;
      for (int d = 0; d < x[1]; d++) {
        c.at[d] = value(w, x[2 + d], 0, l);
        if (d) c.bytes *= c.map->box[d];
      }
      b = x + 2 + x[1];
      if (c.target & 127) return w->address = c.target, fail(w, NOT_16);
    }
    if (!find(w, SHARED, c.target, c.bytes)) return FAULT;
    c.barrier = barrier_at(w, place(w, b[0], b[1], b[2], l));
    if (!c.barrier) return FAULT;
    if (machine->settings.ordered) c.clock = issued(w, l, &c.stamp);
    int policy = machine->settings.policy;
    if (policy == EAGER || policy == TARDY) {
      int fault = perform(machine, &c);
      if (fault) return fail(w, fault);
    } else {
      c.due = machine->rounds + (policy == LATE ? machine->settings.delay : drawn(machine) % machine->settings.delay);
      machine->copies = realloc(machine->copies, (machine->num_copies + 1) * sizeof c);
      machine->copies[machine->num_copies++] = c;
    }
    w->address = c.map ? c.map->base : c.source;  // what the copy is about
  }
  return RAN;
}

// Bulk stores

static int reads_late(Machine *m, int tardy_only) {
  int policy = m->settings.policy;
  return policy == TARDY || (policy == LATE && !tardy_only) || (policy == RANDOM && drawn(m) & 1);
}

static void perform_store(Warp *w, Store *s) {
  s32 last = 0;
  memcpy((u8 *)s->target, w->cta->shared + s->source, s->bytes);
  if (w->machine->settings.ordered) {
    stored(w, s, SHARED, s->source, 0, &last);
    stored(w, s, GLOBAL, s->target, 1, &last);
  }
  s->performed = 1;
}

// a, b, n: target; x: row, width and offset of the source, row of the bytes.
static int store(Warp *w, const Instruction *i, u32 m) {
  const s32 *x = w->code->extra + i->x;
  w->num_polls = 0, w->wrote = 1;
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    Store s = {place(w, i->a, i->b, i->n, l), place(w, x[0], x[1], x[2], l), value(w, x[3], 0, l), where(w, i)};
    if ((s.target | s.source | s.bytes) & 15) return w->address = s.target, fail(w, NOT_16);
    if (!find(w, SHARED, s.source, s.bytes) || !find(w, GLOBAL, s.target, s.bytes)) return FAULT;
    s.group = w->stores_open;
    if (w->machine->settings.ordered) s.clock = issued(w, l, &s.stamp);
    if (!reads_late(w->machine, 0)) perform_store(w, &s);
    w->stores = realloc(w->stores, (w->num_stores + 1) * sizeof s);
    w->stores[w->num_stores++] = s;
  }
  return RAN;
}

// Wait for the groups below `group`.
static void finish_stores(Warp *w, u32 m, s64 group) {
  u32 n = 0;
  for (; n < w->num_stores && (s64)w->stores[n].group < group; n++) {
    Store *s = w->stores + n;
    if (!s->performed) perform_store(w, s);
    if (s->clock) finished(w, m, 2, s->stamp), free(s->clock);
  }
  w->num_stores -= n;
  memmove(w->stores, w->stores + n, w->num_stores * sizeof(Store));
}

#include "sums.c"

static int product(Warp *w, const Instruction *i) {
  const s32 *x = w->code->extra + i->x;
  Product p = {i, i->a == NOBODY ? 0 : value(w, i->a, 1, 0), value(w, i->b, 1, 0), w->predicates[i->c] & 1};
  for (int side = 0; side < 2; side++) {
    u64 descriptor = side ? p.b : p.a;
    if (!descriptor) continue;
    for (int r = side ? x[1] - 1 : 63; r >= 0; r -= 7)
      if (descriptor >> 62 != 1 || !find(w, SHARED, operand_at(descriptor, r, 1), 16)) return fail(w, BAD_DESCRIPTOR);
  }
  p.group = w->products_open;
  w->wrote = 1, w->num_polls = 0;
  if (w->machine->settings.ordered) {
    p.stamp = ++w->machine->stamps;
    for (s32 k = 0; k < x[1] / 2 + (p.a ? 0 : 4); k++) {
      Use *u = w->uses + x[2 + k];
      int is_sum = k < x[1] / 2;
      if (u->touched == w->fences) return fail(w, NO_FENCE);
      if ((is_sum ? u->read : u->summed) > w->complete) return fail(w, IN_FLIGHT);
      *(is_sum ? &u->summed : &u->read) = p.stamp;
    }
    if (p.a) operand_read(w, &p, p.a, 16 * (w->index % 4), 16);
    operand_read(w, &p, p.b, 0, x[1]);
  }
  if (w->late_products || reads_late(w->machine, 1)) w->late_products++;
  else multiply(w, &p), p.performed = 1;
  w->products = realloc(w->products, (w->num_products + 1) * sizeof p);
  w->products[w->num_products++] = p;
  return RAN;
}

static void finish_products(Warp *w, s64 group) {
  u32 n = 0;
  for (; n < w->num_products && (s64)w->products[n].group < group; n++) {
    Product *p = w->products + n;
    if (!p->performed) multiply(w, p), w->late_products--;
    if (w->machine->settings.ordered) finished(w, ~0u, 3, w->complete = p->stamp);
  }
  w->num_products -= n;
  memmove(w->products, w->products + n, w->num_products * sizeof(Product));
}
