/*
 * The program of the Linux guest, its /init: keeps a tree of checksummed nodes in 100 MiB of memory,
 * changes it all the time, verifies the whole of it again and again, and says what it found:
 *
 *   step 7 ok digest=<hex> value=<hex> cell=<hex> mono=<ns> real=<ns> helper=<count>
 *
 * "ok" means: every node was reached once, at its level, with a right checksum, the checksums sum up to
 * the digest that is kept beside the tree, and the versions to the count of changes; else there is "BAD"
 * and why. The value is a chain in memory, from which the changes are drawn too:
 *
 *   value of step n + 1 = mix(mix(value of step n, mono of step n), digest of step n)
 *
 * so whoever has the lines can tell that one memory goes on from another, and two clones of one cut
 * change their trees differently as soon as they read the clock. "cell" is a word read from the tree.
 *
 * Its one argument (after "--" on the kernel's command line) is how many levels the tree has, 17 unless
 * given. With several processors a second thread, bound to the last of them, counts.
 *
 * No C library: a page for the stack, one system call a clock. User code runs natively everywhere.
 */
typedef unsigned long u64;

enum { LEVELS = 17, PAYLOAD = 94, WORDS = PAYLOAD + 5, CHANGES = 1000, PAUSE_NS = 100000000 };
enum { SYS_READ, SYS_WRITE, SYS_OPEN, SYS_CLOSE, SYS_MMAP = 9, SYS_MADVISE = 28, SYS_NANOSLEEP = 35 };
enum { SYS_EXIT = 60, SYS_MOUNT = 165, SYS_SETAFFINITY = 203, SYS_GETAFFINITY = 204, SYS_CLOCK = 228 };

struct node {
    u64 id, level, left, right, version, payload[PAYLOAD];
    u64 sum;
};
_Static_assert(sizeof(struct node) == 800, "131,072 nodes are 100 MiB");

static struct node *nodes; /* index 0 is not used: the root is 1, level L holds 2^L to 2^(L+1) - 1 */
static u64 levels = LEVELS, count, digest, value = 0x5a17, changes;
static volatile u64 helper;
static unsigned char seen[1 << LEVELS];
static u64 helper_stack[512] __attribute__((aligned(16)));

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static u64 mix(u64 hash, u64 word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    return hash ^ hash >> 29;
}

static u64 clock_ns(int clock)
{
    u64 now[2] = {0, 0};
    call(SYS_CLOCK, clock, (long)now, 0, 0, 0, 0);
    return now[0] * 1000000000 + now[1];
}

/* ---- what is said ---- */

static char line[512];
static u64 at;

static void text(const char *from)
{
    while (*from)
        line[at++] = *from++;
}

static void number(u64 what, u64 base)
{
    char digits[20];
    int have = 0;
    do
        digits[have++] = "0123456789abcdef"[what % base];
    while (what /= base);
    while (have)
        line[at++] = digits[--have];
}

static void field(const char *name, u64 what, u64 base)
{
    text(name);
    number(what, base);
}

static void say(void)
{
    line[at++] = '\n';
    for (u64 done = 0; done < at;) {
        long written = call(SYS_WRITE, 1, (long)line + done, at - done, 0, 0, 0);
        if (written <= 0)
            break;
        done += written;
    }
    at = 0;
}

/* ---- the tree ---- */

static u64 sum_of(const struct node *node)
{
    const u64 *words = (const u64 *)node;
    u64 sum = 0;
    for (int word = 0; word < WORDS; word++)
        sum = mix(sum, words[word]);
    return sum;
}

/* Takes a changed node's new sum into the node and the digest. */
static void seal(struct node *node)
{
    digest -= node->sum;
    node->sum = sum_of(node);
    digest += node->sum;
}

static void build(void)
{
    for (u64 id = 1; id <= count; id++) {
        struct node *node = nodes + id;
        node->id = id;
        node->level = 63 - __builtin_clzl(id);
        if (node->level + 1 < levels) {
            node->left = 2 * id;
            node->right = 2 * id + 1;
        }
        for (int word = 0; word < PAYLOAD; word++)
            node->payload[word] = mix(id, word);
        seal(node);
    }
}

static void change(u64 *dice)
{
    u64 roll = *dice = mix(*dice, ++changes);
    struct node *node = nodes + 1 + roll % count;
    node->payload[(roll >> 40) % PAYLOAD] = roll;
    node->version++;
    /* Two nodes of one level swap their left subtrees: still a tree, each node at its level. */
    struct node *other = nodes + (1L << node->level) + (roll >> 20) % (1L << node->level);
    if (node->left && other != node && roll & 1) {
        u64 left = node->left;
        node->left = other->left;
        other->left = left;
        seal(other);
    }
    seal(node);
}

/* What is wrong with the tree, or 0. */
static const char *verify(void)
{
    u64 stack[2 * LEVELS], depth = 0, reached = 0, sums = 0, versions = 0;
    for (u64 id = 0; id <= count; id++)
        seen[id] = 0;
    stack[depth++] = 1;
    while (depth) {
        u64 id = stack[--depth];
        if (id == 0 || id > count)
            return "a link leads nowhere";
        struct node *node = nodes + id;
        if (seen[id]++)
            return "a node is reached twice";
        if (node->id != id || node->level != 63UL - __builtin_clzl(id))
            return "a node is another";
        if (node->sum != sum_of(node))
            return "a checksum";
        reached++;
        sums += node->sum;
        versions += node->version;
        if (node->level + 1 < levels) {
            if (depth + 2 > 2 * LEVELS)
                return "too deep";
            stack[depth++] = node->right;
            stack[depth++] = node->left;
        }
    }
    if (reached != count)
        return "a node is not reached";
    if (versions != changes)
        return "a change is lost";
    return sums == digest ? 0 : "the digest";
}

/* ---- processors ---- */

/* How many processors /proc/cpuinfo names. */
static u64 processors(void)
{
    static char info[4096];
    const char *word = "processor";
    u64 found = 0, matched = 0;
    long file = call(SYS_OPEN, (long)"/proc/cpuinfo", 0, 0, 0, 0, 0), have;
    if (file < 0) {
        call(SYS_MOUNT, (long)"proc", (long)"/proc", (long)"proc", 0, 0, 0);
        file = call(SYS_OPEN, (long)"/proc/cpuinfo", 0, 0, 0, 0, 0);
    }
    while (file >= 0 && (have = call(SYS_READ, file, (long)info, sizeof info, 0, 0, 0)) > 0)
        for (long byte = 0; byte < have; byte++) {
            matched = info[byte] == word[matched] ? matched + 1 : info[byte] == word[0];
            if (matched == 9) {
                found++;
                matched = 0;
            }
        }
    call(SYS_CLOSE, file, 0, 0, 0, 0, 0);
    return found;
}

static void pause_for(u64 ns)
{
    u64 span[2] = {0, ns};
    call(SYS_NANOSLEEP, (long)span, 0, 0, 0, 0, 0);
}

static __attribute__((noreturn, used)) void help(void)
{
    for (;;) {
        for (int turn = 0; turn < 1000000; turn++)
            helper++;
        pause_for(PAUSE_NS);
    }
}

/* A thread that shares everything, on the last processor of `mask`. */
static void start_helper(u64 mask)
{
    u64 last = 1UL << (63 - __builtin_clzl(mask)), rest = mask & ~last;
    long flags = 0x50f00; /* VM, FS, FILES, SIGHAND, THREAD, SYSVSEM */
    long thread;
    __asm__ volatile("mov $56, %%eax\n\t"
                     "xor %%edx, %%edx\n\t"
                     "xor %%r10d, %%r10d\n\t"
                     "xor %%r8d, %%r8d\n\t"
                     "syscall\n\t"
                     "test %%eax, %%eax\n\t"
                     "jnz 1f\n\t"
                     "call help\n"
                     "1:"
                     : "=&a"(thread)
                     : "D"(flags), "S"(helper_stack + 512)
                     : "rcx", "rdx", "r8", "r10", "r11", "memory");
    call(SYS_SETAFFINITY, thread, sizeof last, (long)&last, 0, 0, 0);
    call(SYS_SETAFFINITY, 0, sizeof rest, (long)&rest, 0, 0, 0);
}

/* ---- the run ---- */

static void report(u64 step, const char *wrong)
{
    u64 mono = clock_ns(1);
    u64 real = clock_ns(0);
    field("step ", step, 10);
    if (wrong) {
        text(" BAD ");
        text(wrong);
    } else {
        text(" ok");
    }
    field(" digest=", digest, 16);
    field(" value=", value, 16);
    field(" cell=", nodes[1 + value % count].payload[step % PAYLOAD], 16);
    field(" mono=", mono, 10);
    field(" real=", real, 10);
    field(" helper=", helper, 10);
    value = mix(mix(value, mono), digest);
    say();
}

__attribute__((noreturn, used)) void run(long *arguments)
{
    if (arguments[0] > 1) {
        const char *digit = (const char *)arguments[2];
        for (levels = 0; *digit >= '0' && *digit <= '9'; digit++)
            levels = 10 * levels + *digit - '0';
        if (levels < 2 || levels > LEVELS)
            levels = LEVELS;
    }
    u64 mask = 0;
    call(SYS_GETAFFINITY, 0, sizeof mask, (long)&mask, 0, 0, 0);
    count = (1UL << levels) - 1;
    u64 bytes = (count + 1) * sizeof(struct node), huge = 2UL << 20;
    text("INIT-REACHED witness");
    field(" processors=", processors(), 10);
    u64 affinity = 0;
    for (u64 rest = mask; rest; rest &= rest - 1)
        affinity++;
    field(" affinity=", affinity, 10);
    field(" nodes=", count, 10);
    field(" bytes=", bytes, 10);
    say();
    u64 place = call(SYS_MMAP, 0, bytes + huge, 3, 0x22, -1, 0);
    if (place > -4096UL) {
        text("BAD no memory");
        say();
        call(SYS_EXIT, 1, 0, 0, 0, 0, 0);
    }
    place = (place + huge - 1) & -huge;
    call(SYS_MADVISE, place, bytes, 14 /* MADV_HUGEPAGE */, 0, 0, 0);
    nodes = (struct node *)place;
    build();
    if (mask & (mask - 1))
        start_helper(mask);
    for (u64 step = 1;; step++) {
        u64 dice = value;
        for (int turn = 0; turn < CHANGES; turn++)
            change(&dice);
        report(step, verify());
        pause_for(PAUSE_NS);
    }
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");
