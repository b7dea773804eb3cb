// What the machine consists of. Python makes code, memory and launches, runs it, and looks at warps.
#include <stdlib.h>
#include "lanes.h"

enum { E4M3, BF16 };
enum { GLOBAL, SHARED };
enum { NEGATED = 1, USES_OPERANDS = 2, STRONG = 4, ACQUIRE = 8, RELEASE = 16, SYSTEM = 32, STOPS = 64, RELAXED = 128 };
enum { EAGER, LATE, TARDY, RANDOM };
// What ends a turn of a warp, and a run.
enum { RAN, POLLED, PAUSED, BLOCKED, ENDED, FAULT, STOPPED };
enum { DONE, HOST_TURN, FAULTED, DEADLOCK, TOO_LONG, BREAK, MORE };
enum {
  NO_FAULT, UNMAPPED, MISALIGNED, DIVERGENT, TOO_DEEP, NO_BARRIER, MANY_ARRIVALS, MANY_THREADS, NO_MAP,
  MANY_LANES, NOT_16, BAD_DESCRIPTOR, NO_FENCE, UNFINISHED, BYTES_MISSING, IN_FLIGHT
};
enum { FREE, ON_MBARRIER, ON_BARRIER, ON_LAUNCH };
enum { BASE = 1024, FRAMES = 32, POLLS = 8, MAX_BARRIERS = 96, IDLE_ROUNDS = 64, PATIENCE_ROUNDS = 600, TIMEOUTS = 8 };

typedef struct Machine Machine;
typedef struct Launch Launch;
typedef struct Cta Cta;
typedef struct Warp Warp;
typedef u32 Clock;  // how much of every agent's past comes before: [N] for the generic proxy, [N] for the async

typedef struct { u16 op, flags; s32 guard, d, a, b, c, n, x; } Instruction;
typedef struct {
  const Instruction *instructions;
  const s32 *extra;
  const u32 *constants;
  const s32 *uses;  // by instruction: what it does to registers of products, in `extra`
  s32 num_rows, num_predicates, threads, number;
  s32 shift[2];  // log2 of the smallest access by space
  struct { u64 address, warps; } *seen;  // by instruction, if somebody asks: last access, who executed it
} Code;
typedef struct { u64 base; s32 item, rank; s64 size[5], stride[5]; s32 box[5]; s32 offset; } Map;

typedef struct Shadow Shadow;
typedef struct { u64 base, end; s32 rank; Shadow *shadow; u8 *fresh; } Segment;

typedef struct {
  u32 address, count, flips, agent;
  s64 pending, bytes;
  u64 waiting;  // warps
  Clock *arrived, *done[2];
} Barrier;
typedef struct { u32 threads; u64 waiting; Clock *clock; } Meeting;
typedef struct { s32 join; u32 mask; s32 rejoin; } Frame;
// An asynchronous load that has been issued.
typedef struct {
  Cta *cta;
  Barrier *barrier;
  const Map *map;  // or null: bytes from `source`
  u64 source, due;
  u32 target, bytes, where, stamp;
  s32 at[5];
  Clock *clock;
} Copy;
typedef struct { u64 target; u32 source, bytes, where, stamp, group, performed; Clock *clock; } Store;
typedef struct { const Instruction *i; u64 a, b; u32 keep, group, performed, stamp; } Product;
typedef struct { u8 *target; u32 bytes, clock, agent; u8 data[16]; } Held;
// A register of products: at which fence an instruction used it; the last products that add up in it, that read it.
typedef struct { u32 touched, summed, read; } Use;

struct Warp {
  Machine *machine;
  Cta *cta;
  const Code *code;
  u32 *rows, *predicates;
  s32 index, pc, rejoin, depth, segment, num_polls;
  u32 mask, blocked, what, ended, wrote, fences, fault;
  u64 address, count;  // of the last access; instructions
  u32 stores_open, products_open, num_stores, num_products, late_products, slow, lazy, timed_out;
  Store *stores;
  Product *products;
  struct { s32 pc; u64 hash, address; } polls[POLLS];
  Frame frames[FRAMES];
  // The order of its accesses: lane 0 and the other lanes are agents of their own.
  u32 agent;  // number of lane 0's; then the others', bulk stores', products'
  Clock *clock[2], *fenced[2], *observed[2];
  s32 fence_scope[2];
  Use *uses;  // by row; null without checks
  u32 complete;  // stamp of the last product that is
  Held *held;
  u32 num_held;
  u64 held_low, held_high;
};
struct Cta {
  Launch *launch;
  s32 index, rank, num_warps, left, let;
  u32 num_barriers;
  u8 *shared, *barrier_at;  // number + 1 of the mbarrier at address / 8
  Shadow *shadow;
  Barrier barriers[MAX_BARRIERS];
  Meeting meetings[16];
  Warp *warps;
};
struct Launch {
  const Code *code;
  s32 grid, rank, num_maps, number, running, to_let, started, is_host;
  u32 shared_end, num_waiting;
  u8 *parameters;
  Map *maps;
  Cta *ctas;
  Launch *behind, *next, *before;  // the one that it may overlap; the one after it; any other, to free
  Warp *waiting[256];
};
typedef struct {
  s32 policy, delay, budget, patient, ordered, held_share, num_ranks, max_ctas, agents_per_cta, num_agents;
  u64 seed, max_steps;
} Settings;
typedef struct { s32 kind, space, count, rank, cta; u32 where, other, agent, other_agent; u64 address; } Race;
struct Machine {
  Settings settings;
  u64 time, rounds, steps, remote, random, watch_low, watch_high;
  Warp *stopped;
  Race *races;
  s32 num_races, num_segments, num_ready, num_next, num_copies, idle, max_ready, timeouts;
  Segment *segments;
  Warp **ready, **next;
  Copy *copies;
  Launch **streams, **current;  // by rank: not yet started; the last that has, and does not end
  Launch *all;
  s32 *launches;  // by rank: how many there were
  // Of the order of accesses: words that are used atomically, clocks of hosts, ranks of agents.
  void *places;
  Clock **hosts;
  s32 *rank_of;
  u32 stamps;
};
