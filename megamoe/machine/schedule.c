// Streams, launches and turns: who runs when, and what ends a run.

static void enqueue(Machine *m, Warp *w) { m->next[m->num_next++] = w; }

static void start(Machine *m, Launch *l, Launch *behind) {
  l->behind = behind, l->started = 1;
  m->current[l->rank] = l;
  s32 warps = l->code->threads / 32;
  m->max_ready += l->grid * warps;
  m->ready = realloc(m->ready, m->max_ready * sizeof(Warp *));
  m->next = realloc(m->next, m->max_ready * sizeof(Warp *));
  l->ctas = calloc(l->grid, sizeof(Cta));
  for (s32 n = 0; n < l->grid; n++) {
    Cta *c = l->ctas + n;
    c->launch = l, c->index = n, c->rank = l->rank, c->num_warps = c->left = warps;
    c->shared = aligned_alloc(1024, (l->shared_end + 1023) / 1024 * 1024);
    memset(c->shared, 0xcb, l->shared_end);
    c->barrier_at = calloc(l->shared_end / 8 + 1, 1);
    c->warps = calloc(warps, sizeof(Warp));
    int slow = m->settings.seed && drawn(m) % 4 == 0;
    for (s32 k = 0; k < warps; k++) {
      Warp *w = c->warps + k;
      w->machine = m, w->cta = c, w->code = l->code, w->index = k, w->rejoin = -1, w->mask = ~0u;
      w->slow = slow || (m->settings.seed && drawn(m) % 8 == 0);
      w->rows = calloc(l->code->num_rows + 1, 128);
      w->predicates = calloc(l->code->num_predicates, 4);
      w->predicates[1] = ~0u;
      w->fences = 1;
      if (m->settings.ordered) w->uses = calloc(l->code->num_rows + 1, sizeof(Use));
      for (int lane = 0; lane < 32; lane++) {  // the special registers are the first rows
        u32 special[] = {32 * k + lane, n, l->grid, l->code->threads, lane, k};
        for (int s = 0; s < 6; s++) w->rows[32 * s + lane] = special[s];
      }
      enqueue(m, w);
    }
  }
  if (m->settings.ordered) order_launch(m, l);
}

// Start the next launch of a rank, which runs none; 1 if the host comes first.
static int next_launch(Machine *m, s32 rank) {
  Launch *l = m->streams[rank];
  if (l->is_host) return 1;
  m->streams[rank] = l->next;
  start(m, l, NULL);
  return 0;
}

static void let_dependents(Cta *c) {
  Launch *l = c->launch, *next;
  Machine *m = c->warps->machine;
  if (c->let) return;
  c->let = 1;
  if (--l->to_let || !l->running || m->current[l->rank] != l || !(next = m->streams[l->rank]) || next->is_host) return;
  m->streams[l->rank] = next->next;
  start(m, next, l);
}

static int wait_for_launch(Warp *w) {
  Launch *behind = w->cta->launch->behind;
  if (!behind || !behind->running) {
    if (w->machine->settings.ordered) launch_visible(w);
    return RAN;
  }
  behind->waiting[behind->num_waiting++ & 255] = w;
  return block(w, ON_LAUNCH, 0);
}

static void free_barriers(Cta *c) {
  for (u32 n = 0; n < c->num_barriers; n++) free(c->barriers[n].arrived), free(c->barriers[n].done[0]), free(c->barriers[n].done[1]);
  for (int n = 0; n < 16; n++) free(c->meetings[n].clock);
  free(c->barrier_at), free_shadow(c->shadow);
}

static int end_warp(Warp *w) {
  Machine *m = w->machine;
  Cta *c = w->cta;
  Launch *l = c->launch;
  if (w->num_stores || w->num_products) return fail(w, UNFINISHED);
  if (m->settings.ordered) warp_ended(w);
  w->ended = 1;
  free(w->rows), free(w->predicates), free(w->stores), free(w->products), free(w->uses);
  if (--c->left) return RAN;
  for (u32 n = 0; n < c->num_barriers; n++)
    if (c->barriers[n].bytes) return w->address = c->barriers[n].address, fail(w, BYTES_MISSING);
  free_barriers(c);
  l->running--;
  let_dependents(c);
  if (!l->running) {
    for (u32 n = 0; n < l->num_waiting; n++) wake(l->waiting[n]);
    l->num_waiting = 0;
    if (m->settings.ordered) order_ended(m, l);
    for (s32 n = 0; n < l->grid; n++) free(l->ctas[n].shared), l->ctas[n].shared = NULL;
    if (m->current[l->rank] == l) m->current[l->rank] = NULL;
  }
  return RAN;
}

// One turn: whether it did something.
static int turn(Machine *m, Warp *w, int *status) {
  s32 budget = m->settings.budget;
  if (m->settings.seed) budget = budget / 10 + drawn(m) % (budget - budget / 10);
  u64 before = w->count;
  w->wrote = 0;
  *status = execute(w, budget);
  w->lazy = *status == RAN && w->slow;  // whoever only waits takes every turn
  if (*status == ENDED) *status = end_warp(w) == FAULT ? FAULT : ENDED;
  m->steps += w->count - before;
  return *status == RAN || *status == ENDED || w->wrote;
}

static int land(Machine *m, int everything) {
  s32 left = 0, done = 0;
  Copy *copies = m->copies;
  s32 count = m->num_copies;
  for (s32 n = 0; n < count; n++) {
    if (everything || copies[n].due <= m->rounds) {
      done = 1;
      if (perform(m, copies + n)) {
        m->stopped = copies[n].cta->warps;
        return -fail(m->stopped, MANY_ARRIVALS);
      }
    } else copies[left++] = copies[n];
  }
  m->num_copies = left;
  return done;
}

// Nobody can go on: waits for mbarriers end without their phase, as they may at any time. Whether there
// are any.
static int time_out(Machine *m) {
  int found = 0;
  for (s32 r = 0; r < m->settings.num_ranks; r++)
    for (Launch *l = m->current[r]; l; l = l->behind)
      for (s32 n = 0; n < l->grid; n++)
        for (u32 k = 0; k < l->ctas[n].num_barriers; k++) {
          u64 *waiting = &l->ctas[n].barriers[k].waiting;
          for (u64 rest = *waiting; rest; rest &= rest - 1) l->ctas[n].warps[__builtin_ctzll(rest)].timed_out = found = 1;
          wake_all(l->ctas + n, waiting);
        }
  return found;
}

// Run until all is done or something stops it; `m->stopped` is then the warp that it is about.
int machine_run(Machine *m, s32 max_rounds) {
  while (max_rounds--) {
    s32 busy = 0, at = 0;
    int status;
    if (!m->num_ready) {  // a new round
      for (s32 r = 0; r < m->settings.num_ranks; r++)
        if (!m->current[r] && m->streams[r] && next_launch(m, r)) return HOST_TURN;
      if (!m->num_next && !m->num_copies && (m->timeouts++ == TIMEOUTS || !time_out(m))) {
        for (s32 r = 0; r < m->settings.num_ranks; r++)
          if (m->current[r]) return DEADLOCK;
        return DONE;
      }
      Warp **swap = m->ready;
      m->ready = m->next, m->num_ready = m->num_next, m->next = swap, m->num_next = 0;
      m->rounds++;
      if (m->settings.seed)
        for (s32 n = m->num_ready - 1; n > 0; n--) {
          s32 k = drawn(m) % (n + 1);
          Warp *other = m->ready[n];
          m->ready[n] = m->ready[k], m->ready[k] = other;
        }
    }
    u64 longest = 0;
    for (; at < m->num_ready; at++) {
      Warp *w = m->ready[at];
      u64 count = w->count;
      if (w->lazy && drawn(m) % 16) { enqueue(m, w), busy = 1; continue; }
      busy |= turn(m, w, &status);
      if (w->count - count > longest) longest = w->count - count;
      if (status < BLOCKED) enqueue(m, w);
      if (status == FAULT || status == STOPPED) {
        m->stopped = w;
        m->num_ready -= at;  // go on with it
        memmove(m->ready, m->ready + at, m->num_ready * sizeof(Warp *));
        return status == FAULT ? FAULTED : BREAK;
      }
    }
    m->num_ready = 0;
    m->time += longest;
    int landed = land(m, !busy);
    if (landed < 0) return FAULTED;
    if (m->settings.max_steps && m->steps > m->settings.max_steps) return TOO_LONG;
    m->idle = busy || landed ? 0 : m->idle + 1;
    if (!m->idle) m->timeouts = 0;
    if (m->idle == IDLE_ROUNDS / 2) time_out(m);
    if (m->idle == IDLE_ROUNDS) {  // everybody waits
      if (!m->settings.patient) return DEADLOCK;
      m->time += 100000000000000;  // more than any timeout, which ends the launch
    } else if (m->idle > PATIENCE_ROUNDS) return DEADLOCK;
  }
  return MORE;
}

// What Python calls

Machine *machine_new(const Settings *settings) {
  Machine *m = calloc(1, sizeof *m);
  m->settings = *settings;
  m->random = settings->seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  m->streams = calloc(settings->num_ranks, sizeof *m->streams);
  m->current = calloc(settings->num_ranks, sizeof *m->current);
  m->launches = calloc(settings->num_ranks, sizeof *m->launches);
  m->places = calloc(BUCKETS, sizeof(Place *));
  m->rank_of = calloc(settings->num_agents, sizeof *m->rank_of);
  m->hosts = calloc(settings->num_ranks, sizeof *m->hosts);
  m->races = calloc(MAX_RACES, sizeof(Race));
  for (s32 r = 0; r < settings->num_ranks; r++) m->rank_of[r] = r, m->hosts[r] = clock_new(m);
  return m;
}

void add_segment(Machine *m, u64 base, u64 bytes, s32 rank, s32 shift, const u8 *fresh) {
  m->segments = realloc(m->segments, (m->num_segments + 1) * sizeof(Segment));
  Segment *s = m->segments + m->num_segments++;
  *s = (Segment){base, base + bytes, rank, NULL, (u8 *)fresh};
  if (m->settings.ordered) s->shadow = shadow_of(base, bytes, shift, GLOBAL, rank, -1);
}

// A launch, or without code what the host does in between, at the end of a stream. Its number in it.
s32 add_launch(Machine *m, s32 rank, const Code *code, s32 grid, u32 shared_end, const u8 *parameters,
               u32 bytes, const Map *maps, s32 num_maps) {
  Launch *l = calloc(1, sizeof *l), **end = m->streams + rank;
  *l = (Launch){code, grid, rank, num_maps, .running = grid, .to_let = grid, .shared_end = shared_end, .is_host = !code};
  if (code) {
    l->number = ++m->launches[rank];
    l->parameters = memcpy(calloc(bytes + 8, 1), parameters, bytes);
    l->maps = memcpy(calloc(num_maps + 1, sizeof(Map)), maps, num_maps * sizeof(Map));
  }
  while (*end) end = &(*end)->next;
  *end = l, l->before = m->all, m->all = l;
  return l->number;
}

s32 host_first(const Machine *m, s32 rank) { return !m->current[rank] && m->streams[rank] && m->streams[rank]->is_host; }

// The host has done what it had to do first in the stream of this rank.
void host_done(Machine *m, s32 rank) {
  Launch *l = m->streams[rank];
  m->streams[rank] = l->next;
}

// The warp of a launch that runs on this rank: the last one, if `back` is 0, or the one before it. 0 if
// there is none, 1 if it has ended.
s32 running(Machine *m, s32 rank, s32 cta, s32 warp, Warp **found) {
  Launch *l = m->current[rank];
  if (!l || cta >= l->grid || warp >= l->code->threads / 32) return 0;
  *found = l->ctas[cta].warps + warp;
  return 1 + !(*found)->ended;
}

// For tests: start the first launch of every rank, whose host has done its part, then execute single
// instructions of warps.
void begin(Machine *m) {
  for (s32 r = 0; r < m->settings.num_ranks; r++)
    while (next_launch(m, r)) host_done(m, r);
}
s32 step(Machine *m, Warp *w) {
  m->num_next = 0;
  s32 status = execute(w, 1);
  return status == ENDED ? end_warp(w), ENDED : status;
}

static void free_launch(Launch *l) {
  for (s32 n = 0; l->ctas && n < l->grid; n++) {
    Cta *c = l->ctas + n;
    for (s32 k = 0; k < c->num_warps; k++) {
      Warp *w = c->warps + k;
      if (w->ended) continue;
      for (u32 s = 0; s < w->num_stores; s++) free(w->stores[s].clock);
      free(w->rows), free(w->predicates), free(w->stores), free(w->products), free(w->held), free(w->uses);
      for (int h = 0; h < 2; h++) free(w->clock[h]), free(w->fenced[h]), free(w->observed[h]);
    }
    if (c->left) free_barriers(c);
    free(c->shared);
    free(c->warps);
  }
  free(l->ctas), free(l->parameters), free(l->maps), free(l);
}

void machine_free(Machine *m) {
  for (s32 n = 0; n < m->num_copies; n++) free(m->copies[n].clock);
  for (Launch *l = m->all, *next; l; l = next) next = l->before, free_launch(l);
  for (s32 n = 0; n < m->num_segments; n++) free_shadow(m->segments[n].shadow);
  for (s32 r = 0; r < m->settings.num_ranks; r++) free(m->hosts[r]);
  for (s32 n = 0; n < BUCKETS; n++)
    for (Place *p = ((Place **)m->places)[n], *next; p; p = next) next = p->next, forget(p), free(p);
  free(m->segments), free(m->ready), free(m->next), free(m->copies), free(m->streams), free(m->current);
  free(m->launches), free(m->places), free(m->hosts), free(m->rank_of), free(m->races), free(m);
}
