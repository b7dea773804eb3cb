// The order of accesses: vector clocks, what every byte was last touched by, and stores that others do not
// see yet.
//
// Agents are lane 0 of a warp, its other lanes, its bulk stores, its products, the copies that complete on
// an mbarrier, and the host of a rank. A clock says how much of every agent's past comes before: in three
// parts, for the generic proxy and for the async proxy in global and in shared memory, to which a proxy
// fence hands on what the generic one knows. An access that the clocks do not order after what it meets is
// a race, whatever this run made of it.

enum { PAGE = 256, MAX_RACES = 64, MAX_HELD = 1024 };
enum { WRITE_READ, WRITE_WRITE, READ_WRITE, UNWRITTEN, STALE };

typedef struct { u32 clock; u16 agent; u8 flags, launch; } Cell;
typedef struct Reader { struct Reader *next; u16 agent, flags; u32 clock[PAGE], where[PAGE]; } Reader;
typedef struct { Cell cell[PAGE]; u32 where[PAGE]; Reader *readers; } Page;
struct Shadow { Page **pages; u64 num_pages; s32 shift, space, rank, cta; u64 base; };
typedef struct Release { struct Release *next; s32 rank, flags; Clock clock[]; } Release;
typedef struct Place { struct Place *next; u64 address; Release *releases; } Place;
enum { BUCKETS = 1024 };

typedef struct {
  u32 agent, clock, where, write, flags, launch, plain_load;
  u32 beside, beside_clock;  // the other half of the warp
  const Clock *writes, *reads;  // what it comes after
  const u8 *fresh;
} Access;

static Shadow *shadow_of(u64 base, u64 bytes, s32 shift, s32 space, s32 rank, s32 cta) {
  Shadow *s = calloc(1, sizeof *s);
  *s = (Shadow){.num_pages = (bytes >> shift) / PAGE + 1, .shift = shift, .space = space, .rank = rank, .cta = cta, .base = base};
  s->pages = calloc(s->num_pages, sizeof(Page *));
  return s;
}
static void free_shadow(Shadow *s) {
  if (!s) return;
  for (u64 n = 0; n < s->num_pages; n++) {
    if (!s->pages[n]) continue;
    for (Reader *r = s->pages[n]->readers, *next; r; r = next) next = r->next, free(r);
    free(s->pages[n]);
  }
  free(s->pages), free(s);
}

static void race(Machine *m, Shadow *s, int kind, u64 granule, const Access *a, u32 other, u32 other_where) {
  for (s32 n = 0; n < m->num_races; n++) {
    Race *r = m->races + n;
    if (r->kind == kind && r->where == a->where && r->other == other_where) { r->count++; return; }
  }
  if (m->num_races == MAX_RACES) return;
  m->races[m->num_races++] = (Race){kind, s->space, 1, s->rank, s->cta, a->where, other_where,
                                    a->agent, other, s->base + (granule << s->shift)};
}

// Two strong accesses do not race if the scope of both holds the other.
static int both_strong(const Machine *m, const Access *a, u32 agent, u32 flags) {
  if (!(a->flags & flags & STRONG)) return 0;
  return a->flags & flags & SYSTEM || m->rank_of[agent] == m->rank_of[a->agent];
}

static void check(Machine *m, Shadow *s, u64 address, u32 bytes, const Access *a) {
  u64 granule = (address - s->base) >> s->shift, end = ((address - s->base + bytes - 1) >> s->shift) + 1;
  while (granule < end) {
    Page **at = s->pages + granule / PAGE, *p = *at ? *at : (*at = calloc(1, sizeof(Page)));
    u32 first = granule % PAGE, last = first + (end - granule) > PAGE ? PAGE : first + (end - granule);
    u64 seen = ~0ull, cell;
    granule -= first;
    u32 same = first + 1 == last || !memcmp(p->cell + first, p->cell + first + 1, 8 * (last - first - 1));
    for (u32 k = first; k < (same ? first + 1 : last); k++) {
      memcpy(&cell, p->cell + k, 8);
      if (cell == seen) continue;
      seen = cell;
      Cell c = p->cell[k];
      // Lanes that store to one place with one instruction: one of them wins.
      if (a->write && c.clock == a->beside_clock && c.agent == a->beside && p->where[k] == a->where) continue;
      if (c.clock > a->writes[c.agent] && !both_strong(m, a, c.agent, c.flags))
        race(m, s, a->write ? WRITE_WRITE : WRITE_READ, granule + k, a, c.agent, p->where[k]);
      else if (a->fresh && a->fresh[((granule + k) << s->shift) / 128] && c.launch != (u8)a->launch)
        race(m, s, c.clock ? STALE : UNWRITTEN, granule + k, a, c.agent, p->where[k]);
    }
    if (a->write) {
      for (Reader *r = p->readers; r; r = r->next) {
        if (both_strong(m, a, r->agent, r->flags)) continue;
        u32 known = a->reads[r->agent];
        for (u32 k = first; k < last; k++)
          if (r->clock[k] > known) { race(m, s, READ_WRITE, granule + k, a, r->agent, r->where[k]); break; }
      }
      for (u32 k = first; k < last; k++) p->cell[k] = (Cell){a->clock, a->agent, a->flags, a->launch}, p->where[k] = a->where;
    } else {
      Reader *r = p->readers;
      while (r && (r->agent != a->agent || r->flags != a->flags)) r = r->next;
      if (!r) {
        r = calloc(1, sizeof *r);
        r->agent = a->agent, r->flags = a->flags, r->next = p->readers, p->readers = r;
      }
      for (u32 k = first; k < last; k++) r->clock[k] = a->clock, r->where[k] = a->where;
    }
    granule += last;
  }
}

// Whether any of these bytes was stored: a word that is not needed may travel with others.
static int written(const Shadow *s, u64 address, u32 bytes) {
  for (u64 k = (address - s->base) >> s->shift; k <= (address - s->base + bytes - 1) >> s->shift; k++)
    if (s->pages[k / PAGE] && s->pages[k / PAGE]->cell[k % PAGE].clock) return 1;
  return 0;
}

static void touch(Machine *m, Cta *c, int space, u64 address, u32 bytes, Access *a, s32 *last) {
  if (!bytes) return;
  if (space == SHARED) { a->fresh = NULL; check(m, c->shadow, address, bytes, a); return; }
  Segment *s = segment_of(m, last, address, bytes);
  if (!s) return;
  a->fresh = a->plain_load ? s->fresh : NULL;
  check(m, s->shadow, address, bytes, a);
}

// Clocks

static Clock *clock_new(const Machine *m) { return calloc(3 * m->settings.num_agents, sizeof(Clock)); }
static void join(const Machine *m, Clock *to, const Clock *from) {
  s32 n = 3 * m->settings.num_agents;
  for (s32 k = 0; k < n; k++) to[k] = to[k] > from[k] ? to[k] : from[k];
}
static void stamp(const Machine *m, Clock *clock, u32 agent, u32 number) {
  for (int part = 0; part < 3; part++) {
    Clock *own = clock + part * m->settings.num_agents + agent;
    if (*own < number) *own = number;
  }
}
#define HALVES(w, m) for (int h = 0; h < 2; h++) if (h ? (m) & ~1u : (m) & 1)

static void flush_held(Warp *w, const Clock *known) {  // those that `known` covers, or all
  u32 left = 0;
  for (u32 n = 0; n < w->num_held; n++) {
    Held *e = w->held + n;
    if (!known || e->clock <= known[e->agent]) memcpy(e->target, e->data, e->bytes);
    else w->held[left++] = *e;
  }
  w->num_held = left;
  if (!left) w->held_low = ~0ull, w->held_high = 0;
}

// What comes before the holder of a clock is visible to it.
static void reveal(Machine *m, const Clock *known) {
  if (!m->settings.held_share) return;
  for (s32 r = 0; r < m->settings.num_ranks; r++)
    for (Launch *l = m->current[r]; l; l = l->behind)
      for (s32 n = 0; n < l->grid; n++)
        for (s32 k = 0; k < l->ctas[n].num_warps; k++)
          if (l->ctas[n].warps[k].num_held) flush_held(l->ctas[n].warps + k, known);
}

static void learn(Warp *w, u32 m, const Clock *from) {
  if (!from) return;
  HALVES(w, m) join(w->machine, w->clock[h], from);
  reveal(w->machine, from);
}

// What the lanes do from here on is not covered by clocks that they have handed out.
static void tick(Warp *w, u32 m) {
  Machine *machine = w->machine;
  if (w->num_held && (s32)(drawn(machine) % 100) >= machine->settings.held_share) flush_held(w, NULL);
  HALVES(w, m) w->clock[h][w->agent + h] = ++machine->stamps;
}

static void warp_sync(Warp *w) {
  if (!w->machine->settings.ordered) return;
  join(w->machine, w->clock[0], w->clock[1]);
  memcpy(w->clock[1], w->clock[0], 3 * w->machine->settings.num_agents * sizeof(Clock));
  tick(w, ~0u);
}

static void hand_to(Machine *m, Clock **to, const Clock *from) {
  if (!*to) *to = clock_new(m);
  join(m, *to, from);
}

// Barriers

static void arrived(Warp *w, int lane, Barrier *b) { hand_to(w->machine, &b->arrived, w->clock[lane > 0]); }
static void phase_done(Machine *m, Barrier *b) {
  if (b->arrived) hand_to(m, &b->done[(b->flips - 1) & 1], b->arrived);
}
static void passed_phase(Warp *w, u32 m, const Barrier *b) { learn(w, m, b->done[(b->flips - 1) & 1]); }
static void came(Warp *w, Meeting *meeting) {
  for (int h = 0; h < 2; h++) hand_to(w->machine, &meeting->clock, w->clock[h]);
  tick(w, ~0u);
}
static void met(Cta *c, Meeting *meeting) {
  for (u64 rest = meeting->waiting; rest; rest &= rest - 1) learn(c->warps + __builtin_ctzll(rest), ~0u, meeting->clock);
  memset(meeting->clock, 0, 3 * c->warps->machine->settings.num_agents * sizeof(Clock));
}

// Fences; flags of the instruction: the scope. n of a proxy fence: 1 for global, 2 for shared memory.

static void fence(Warp *w, const Instruction *i, u32 m) {
  Machine *machine = w->machine;
  if (!machine->settings.ordered) return;
  HALVES(w, m) {
    if (w->observed[h]) learn(w, h ? ~1u : 1, w->observed[h]);
    if (!w->fenced[h]) w->fenced[h] = clock_new(machine);
    memcpy(w->fenced[h], w->clock[h], 3 * machine->settings.num_agents * sizeof(Clock));
    w->fence_scope[h] = i->flags & SYSTEM;
  }
  tick(w, m);
}
static void proxy_fence(Warp *w, const Instruction *i, u32 m) {
  s32 n = w->machine->settings.num_agents;
  if (!w->machine->settings.ordered) return;
  HALVES(w, m)
    for (int part = 1; part < 3; part++)
      if (i->n & part)
        for (s32 k = 0; k < n; k++)
          if (w->clock[h][part * n + k] < w->clock[h][k]) w->clock[h][part * n + k] = w->clock[h][k];
  tick(w, m);
}

// Words that are used atomically

static Place *place_of(Machine *m, u64 address, int make) {
  Place **bucket = (Place **)m->places + (address >> 2) * 2654435761u % BUCKETS;
  for (Place *p = *bucket; p; p = p->next)
    if (p->address == address) return p;
  if (!make) return NULL;
  Place *p = calloc(1, sizeof *p);
  p->address = address, p->next = *bucket;
  return *bucket = p;
}
static void forget(Place *p) {
  for (Release *r = p->releases, *next; r; r = next) next = r->next, free(r);
  p->releases = NULL;
}
static void publish(Machine *m, Place *p, s32 rank, s32 scope, const Clock *clock) {
  Release *r = p->releases;
  while (r && (r->rank != rank || r->flags != scope)) r = r->next;
  if (!r) {
    r = calloc(1, sizeof *r + 3 * m->settings.num_agents * sizeof(Clock));
    r->rank = rank, r->flags = scope, r->next = p->releases, p->releases = r;
  }
  join(m, r->clock, clock);
}

static void strong(Warp *w, const Instruction *i, int h, u64 address, int reads, int writes) {
  Machine *m = w->machine;
  s32 rank = w->cta->rank, scope = i->flags & SYSTEM;
  Place *p = place_of(m, address, writes);
  if (!p) return;
  if (reads)
    for (Release *r = p->releases; r; r = r->next)
      if (r->rank == rank || (r->flags && scope)) {
        if (i->flags & ACQUIRE) learn(w, h ? ~1u : 1, r->clock);
        else hand_to(m, &w->observed[h], r->clock);
      }
  if (!writes) return;
  if (i->op == OP_st) forget(p);  // only atomics carry on what others released
  if (i->flags & RELEASE) publish(m, p, rank, scope, w->clock[h]);
  else if (w->fenced[h]) publish(m, p, rank, scope & w->fence_scope[h], w->fenced[h]);
}

// Loads, stores and atomics of lanes

static void before_access(Warp *w, const Instruction *i, u32 m, int space, const u64 *address, u32 bytes, int reads, int writes) {
  Machine *machine = w->machine;
  s32 last = w->segment;
  Access a = {.where = where(w, i), .write = writes, .flags = i->flags & (STRONG | SYSTEM), .launch = w->cta->launch->number};
  a.plain_load = reads && !a.flags;
  for (u32 rest = reads && space == SHARED ? m : 0; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    Shadow *s = w->cta->shadow;
    a.agent = w->agent + (l > 0);
    if (!written(s, address[l], bytes)) race(machine, s, UNWRITTEN, address[l] >> s->shift, &a, 0, 0);
  }
  for (u32 rest = m; rest;) {
    int l = __builtin_ctz(rest), h = l > 0;
    u64 from = address[l], to = from + bytes;
    for (rest &= rest - 1; h && rest; rest &= rest - 1) {  // neighbours, and lanes with the same address
      u64 next = address[__builtin_ctz(rest)];
      if (next == to) to += bytes;
      else if (next < from || next + bytes > to) break;
    }
    if (w->num_held && from < w->held_high && to > w->held_low && (reads || a.flags)) flush_held(w, NULL);
    a.agent = w->agent + h, a.clock = w->clock[h][a.agent];
    a.beside = w->agent + !h, a.beside_clock = w->clock[!h][a.beside];
    a.writes = a.reads = w->clock[h];
    touch(machine, w->cta, space, from, to - from, &a, &last);
  }
  if (!(i->flags & STRONG) || space == SHARED) return;
  u64 before = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest);
    if (address[l] != before || l == 1) strong(w, i, l > 0, before = address[l], reads, writes);
  }
  if (i->flags & RELEASE) tick(w, m);
}

// Keep stores of the lanes back: where their bytes go meanwhile. Nobody else sees them yet.
static int hold(Warp *w, const Instruction *i, u32 m, u8 **at, u32 bytes, u8 **held) {
  if (i->flags & STRONG || !w->machine->settings.held_share) return 0;
  if (!w->held) w->held = malloc((MAX_HELD + 32) * sizeof(Held));
  if (w->num_held > MAX_HELD) flush_held(w, NULL);
  for (u32 rest = m; rest; rest &= rest - 1) {
    int l = __builtin_ctz(rest), h = l > 0;
    Held *e = w->held + w->num_held++;
    *e = (Held){at[l], bytes, w->clock[h][w->agent + h], w->agent + h};
    u64 address = at[l] >= w->cta->shared && at[l] < w->cta->shared + w->cta->launch->shared_end
                      ? (u64)(at[l] - w->cta->shared) : (u64)at[l];
    if (address < w->held_low) w->held_low = address;
    if (address + bytes > w->held_high) w->held_high = address + bytes;
    held[l] = e->data;
  }
  return 1;
}

// Asynchronous copies and products

static Clock *issued(Warp *w, int lane, u32 *number) {
  Machine *m = w->machine;
  Clock *clock = clock_new(m);
  flush_held(w, NULL);
  memcpy(clock, w->clock[lane > 0], 3 * m->settings.num_agents * sizeof(Clock));
  *number = ++m->stamps;
  tick(w, lane ? ~1u : 1);
  return clock;
}

static void async_access(Machine *m, Cta *c, u32 agent, u32 number, const Clock *clock, u32 place, int space, u64 address, u32 bytes, int write, s32 *last) {
  Access a = {.agent = agent, .clock = number, .where = place, .write = write, .launch = c->launch->number};
  a.writes = clock + (space == GLOBAL ? 1 : 2) * m->settings.num_agents;
  a.reads = clock;
  touch(m, c, space, address, bytes, &a, last);
}
static void copied(Machine *m, const Copy *c, int space, u64 address, u32 bytes, int write, s32 *last) {
  async_access(m, c->cta, c->barrier->agent, c->stamp, c->clock, c->where, space, address, bytes, write, last);
}
static void landed(Machine *m, Copy *c) {
  if (!c->barrier->arrived) c->barrier->arrived = clock_new(m);
  stamp(m, c->barrier->arrived, c->barrier->agent, c->stamp);
  free(c->clock), c->clock = NULL;
}
static void stored(Warp *w, const Store *s, int space, u64 address, int write, s32 *last) {
  async_access(w->machine, w->cta, w->agent + 2, s->stamp, s->clock, s->where, space, address, s->bytes, write, last);
}
static void operand_read(Warp *w, const Product *p, u64 descriptor, int first, int rows) {
  s32 last = 0;
  for (int r = first; r < first + rows; r++)
    async_access(w->machine, w->cta, w->agent + 3, p->stamp, w->clock[0], where(w, p->i), SHARED,
                 operand_at(descriptor, r, 0) & ~31u, 32, 0, &last);
}
static void finished(Warp *w, u32 m, int which, u32 number) {
  HALVES(w, m) stamp(w->machine, w->clock[h], w->agent + which, number);
}

// Launches

static void everything_known(Machine *m, Clock *clock) {
  s32 n = m->settings.num_agents;
  for (s32 k = 0; k < 2 * n; k++)
    if (clock[n + k] < clock[k % n]) clock[n + k] = clock[k % n];
}

// Bytes of the rank's fresh regions that nobody has written for this launch become garbage.
static void poison(Machine *m, const Launch *l) {
  for (s32 n = 0; n < m->num_segments; n++) {
    Segment *s = m->segments + n;
    if (!s->fresh || s->rank != l->rank) continue;
    for (u64 at = s->base; at < s->end; at += 1 << s->shadow->shift) {
      u64 granule = (at - s->base) >> s->shadow->shift;
      Page *p = s->shadow->pages[granule / PAGE];
      if (s->fresh[(at - s->base) / 128] && (!p || p->cell[granule % PAGE].launch != (u8)l->number))
        memset((u8 *)at, 0xff, 1 << s->shadow->shift);
    }
  }
}

static void order_launch(Machine *m, Launch *l) {
  const Settings *set = &m->settings;
  s32 n = set->num_agents;
  if (!l->behind) poison(m, l);
  everything_known(m, m->hosts[l->rank]);
  for (s32 k = 0; k < l->grid; k++) {
    Cta *c = l->ctas + k;
    u32 agent = set->num_ranks + (l->rank * set->max_ctas + k) * set->agents_per_cta;
    c->shadow = shadow_of(0, l->shared_end, l->code->shift[SHARED], SHARED, l->rank, k);
    for (s32 j = 0; j < set->agents_per_cta; j++) m->rank_of[agent + j] = l->rank;
    for (s32 j = 0; j < c->num_warps; j++) {
      Warp *w = c->warps + j;
      w->agent = agent + 4 * j, w->held_low = ~0ull;
      for (int h = 0; h < 2; h++) {
        w->clock[h] = malloc(3 * n * sizeof(Clock));
        memcpy(w->clock[h], m->hosts[l->rank], 3 * n * sizeof(Clock));
      }
      tick(w, ~0u);
    }
  }
}
static void launch_visible(Warp *w) {
  everything_known(w->machine, w->machine->hosts[w->cta->rank]);
  learn(w, ~0u, w->machine->hosts[w->cta->rank]);
}
static void warp_ended(Warp *w) {
  for (int h = 0; h < 2; h++) {
    join(w->machine, w->machine->hosts[w->cta->rank], w->clock[h]);
    free(w->clock[h]), free(w->fenced[h]), free(w->observed[h]);
  }
}
static void order_ended(Machine *m, Launch *l) {  // only now is everything seen
  for (s32 n = 0; n < l->grid; n++)
    for (s32 k = 0; k < l->ctas[n].num_warps; k++) {
      Warp *w = l->ctas[n].warps + k;
      flush_held(w, NULL);
      free(w->held), w->held = NULL;
    }
  if (m->current[l->rank] && m->current[l->rank] != l) poison(m, m->current[l->rank]);
}

// The host of a rank has written bytes for its next launch, number `launch`.
void host_wrote(Machine *m, s32 rank, s32 launch, u64 address, u64 bytes) {
  s32 last = 0;
  Clock *clock = m->hosts[rank];
  stamp(m, clock, rank, ++m->stamps);
  Access a = {.agent = rank, .clock = m->stamps, .write = 1, .launch = launch, .writes = clock, .reads = clock};
  touch(m, NULL, GLOBAL, address, bytes, &a, &last);
}
