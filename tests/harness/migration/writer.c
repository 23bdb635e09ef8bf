/*
 * The work of the migrated guest: numbered blocks and files, written all the time, each of which tells its version.
 *
 *     writer DEVICE START BLOCKS PAUSE FOLDER
 *
 * Two processes write blocks of 4 KiB with O_DIRECT at random places of DEVICE from byte START on, and read others back.
 * Each sector is filled with {magic, block, version, sector}, so that a stale, torn or misplaced one shows. A third
 * process writes files to FOLDER: a new file, fsync, rename. PAUSE: microseconds between two writes.
 *
 * Which version each block and file has is kept in memory, which a migration moves by another way than the disk. At the
 * word "stop" on stdin the table is written after the last block, and its checksum is printed. A line of figures four times
 * a second: RATE writes reads files errors stale.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, SECTOR = 512, WRITERS = 2, FILES = 64 };
#define MAGIC 0x51444b21u
#define DOUBTFUL 0x80000000u /* a write failed: the block may have this version or the one before */

struct shared {
    volatile int stop;
    volatile uint32_t writes, reads, files, errors, stale;
    volatile uint32_t file[FILES];
    volatile uint32_t version[];
};

static struct shared *shared;
static const char *device, *folder;
static uint64_t start, blocks;
static int pause_us;

static void fill(uint32_t *words, uint32_t block, uint32_t version)
{
    for (int sector = 0; sector < BLOCK / SECTOR; sector++)
        for (int i = 0; i < SECTOR / 16; i++, words += 4) {
            words[0] = MAGIC; words[1] = block; words[2] = version; words[3] = sector;
        }
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13; *state ^= *state >> 7; *state ^= *state << 17;
    return *state;
}

static void write_blocks(int me)
{
    static char buffer[BLOCK] __attribute__((aligned(BLOCK))), wanted[BLOCK];
    int fd = open(device, O_RDWR | O_DIRECT);
    uint64_t state = 88172645463325252ull + me;
    if (fd < 0) { printf("GUEST-FAILED: open: %s\n", strerror(errno)); exit(1); }
    while (!shared->stop) {
        uint32_t block = next(&state) % (blocks / WRITERS) * WRITERS + me;
        uint32_t version = (shared->version[block] & ~DOUBTFUL) + 1;
        fill((uint32_t *)buffer, block, version);
        /* The table first: a write that was cut off is then known as one that may have happened. */
        shared->version[block] = version | DOUBTFUL;
        if (pwrite(fd, buffer, BLOCK, start + (uint64_t)block * BLOCK) == BLOCK)
            shared->version[block] = version;
        else
            shared->errors++;
        shared->writes++;
        block = next(&state) % (blocks / WRITERS) * WRITERS + me;
        if (!(shared->version[block] & DOUBTFUL)) {
            if (pread(fd, buffer, BLOCK, start + (uint64_t)block * BLOCK) == BLOCK) {
                fill((uint32_t *)wanted, block, shared->version[block]);
                if (memcmp(buffer, wanted, BLOCK)) {
                    uint32_t *found = (uint32_t *)buffer;
                    if (!shared->stale++)
                        printf("STALE block %u: version %u, not %u\n", block, found[2], shared->version[block]);
                }
            } else
                shared->errors++;
            shared->reads++;
        }
        if (pause_us) usleep(pause_us);
    }
    exit(0);
}

static void write_files(void)
{
    char path[256], partial[256], text[BLOCK];
    snprintf(partial, sizeof partial, "%s/partial", folder);
    for (unsigned turn = 0; !shared->stop; turn++) {
        unsigned number = turn % FILES;
        uint32_t version = (shared->file[number] & ~DOUBTFUL) + 1;
        int length = snprintf(text, sizeof text, "file %u version %u\n", number, version);
        int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC, 0600), good = fd >= 0;
        for (int line = 0; good && line < 400; line++)
            good = write(fd, text, length) == length;
        good = good && !fsync(fd);
        if (fd >= 0) close(fd);
        snprintf(path, sizeof path, "%s/f%02u", folder, number);
        shared->file[number] = version | DOUBTFUL;
        if (good && !rename(partial, path)) shared->file[number] = version;
        else shared->errors++;
        shared->files++;
        usleep(pause_us + 2000);
    }
    exit(0);
}

static uint32_t checksum(const volatile uint32_t *words, size_t count)
{
    uint32_t sum = 2166136261u;
    for (size_t i = 0; i < count; i++) sum = (sum ^ words[i]) * 16777619u;
    return sum;
}

static int save_table(void)
{
    size_t used = (FILES + blocks) * 4, size = (used + BLOCK - 1) / BLOCK * BLOCK;
    char *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = open(device, O_RDWR | O_DIRECT);
    memcpy(copy, (void *)shared->file, used);
    if (fd < 0 || pwrite(fd, copy, size, start + blocks * BLOCK) != (ssize_t)size || fsync(fd)) return 1;
    printf("TABLE %u\n", checksum(shared->file, FILES + blocks));
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 6) return 2;
    device = argv[1]; start = strtoull(argv[2], 0, 0); blocks = strtoull(argv[3], 0, 0);
    pause_us = atoi(argv[4]); folder = argv[5];
    setlinebuf(stdout);
    size_t size = sizeof *shared + blocks * 4;
    shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (shared == MAP_FAILED) return 1;
    for (int me = 0; me < WRITERS; me++)
        if (!fork()) write_blocks(me);
    if (!fork()) write_files();
    struct pollfd console = {.fd = 0, .events = POLLIN};
    char line[64];
    for (;;) {
        if (poll(&console, 1, 250) > 0 && read(0, line, sizeof line) >= 4 && !memcmp(line, "stop", 4)) break;
        printf("RATE %u %u %u %u %u\n", shared->writes, shared->reads, shared->files, shared->errors, shared->stale);
    }
    shared->stop = 1;
    while (wait(NULL) > 0) { }
    printf("RATE %u %u %u %u %u\n", shared->writes, shared->reads, shared->files, shared->errors, shared->stale);
    return save_table();
}
