/* Drives the balloon (virtio 1.2, 5.5): tells how its memory is used whenever it is asked, and gives as many pages as the
   device wants, or takes them back. */
#include "virtio.h"

#define FIRST_PAGE 1024
#define BATCH 64

static struct queue inflate, deflate, statistics;
static struct {
    uint16_t tag;
    uint64_t value;
} __attribute__((packed)) told[4];
static uint32_t pages[BATCH];
static uint32_t given;

static void move(struct queue *queue, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        pages[i] = FIRST_PAGE + first + i;
    describe(queue, 0, pages, count * 4, 0);
    offer(queue, 0);
    wait_for(queue);
}

static void follow(uint64_t device) {
    uint32_t wanted = get32(device + CONFIG);
    if (wanted == given)
        return;
    while (given < wanted) {
        uint32_t count = wanted - given < BATCH ? wanted - given : BATCH;
        move(&inflate, given, count);
        given += count;
    }
    while (given > wanted) {
        uint32_t count = given - wanted < BATCH ? given - wanted : BATCH;
        move(&deflate, given - count, count);
        given -= count;
    }
    set32(device + CONFIG + 4, given);
    report("pages", given);
}

void guest_main(const char *command_line) {
    uint64_t device = find_device(command_line, ID_BALLOON, 0);
    if (!device) {
        print("no balloon\r\n");
        power_off();
    }
    begin_device(device, 1 << 1 | 1 << 2);
    begin_queue(device, 0, &inflate);
    begin_queue(device, 1, &deflate);
    begin_queue(device, 2, &statistics);
    finish_device(device);
    print("balloon\r\n");
    /* Tags: 4 free, 5 total, 6 available, 7 caches, in bytes. */
    for (uint16_t i = 0; i < 4; i++) {
        told[i].tag = (uint16_t)(4 + i);
        told[i].value = (uint64_t)(i + 1) << 20;
    }
    describe(&statistics, 0, told, sizeof told, 0);
    offer(&statistics, 0);
    for (;;) {
        uint32_t length;
        look_up();
        follow(device);
        if (taken(&statistics, &length) >= 0)
            offer(&statistics, 0);
    }
}
