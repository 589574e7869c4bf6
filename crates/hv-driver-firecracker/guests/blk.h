/* The first disk (virtio 1.2, 5.2). */
#ifndef BLK_H
#define BLK_H

#include "virtio.h"

#define SECTOR 512
#define PIECE 16384

static struct queue queue;
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} request;
static uint8_t status;
static uint8_t data[PIECE];

enum { READ = 0, WRITE = 1 };

static inline uint8_t transfer(uint32_t type, uint64_t sector, uint32_t length) {
    request.type = type;
    request.sector = sector;
    status = 0xff;
    describe(&queue, 0, &request, 16, DESC_NEXT);
    describe(&queue, 1, data, length, DESC_NEXT | (type == READ ? DESC_WRITE : 0));
    describe(&queue, 2, &status, 1, DESC_WRITE);
    offer(&queue, 0);
    wait_for(&queue);
    return status;
}

/* The device; ends if there is none. */
static inline uint64_t begin_disk(const char *command_line) {
    uint64_t device = find_device(command_line, ID_BLK, 0);
    if (!device) {
        print("no disk\r\n");
        power_off();
    }
    begin_device(device, 0);
    begin_queue(device, 0, &queue);
    finish_device(device);
    return device;
}

#endif
