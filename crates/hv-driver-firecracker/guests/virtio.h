/* Virtio devices on the memory bus (virtio 1.2, 4.2): where they are is on the command line, because it moves between
   versions of Firecracker. Split queues (2.7), polled. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"

#define QUEUE_SIZE 8

enum { ID_NET = 1, ID_BLK = 2, ID_BALLOON = 5, ID_VSOCK = 19 };

/* Offsets of registers (4.2.2). */
enum {
    MAGIC = 0x00, DEVICE_ID = 0x08, DEVICE_FEATURES = 0x10, DEVICE_FEATURES_SEL = 0x14, DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30, QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50,
    INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, STATUS = 0x70, QUEUE_DESC = 0x80, QUEUE_DRIVER = 0x90,
    QUEUE_DEVICE = 0xa0, CONFIG = 0x100,
};

enum { DESC_NEXT = 1, DESC_WRITE = 2 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct queue {
    struct descriptor descriptors[QUEUE_SIZE];
    struct {
        uint16_t flags, index, ring[QUEUE_SIZE];
    } available;
    struct {
        volatile uint16_t flags, index;
        struct {
            volatile uint32_t id, length;
        } ring[QUEUE_SIZE];
    } used __attribute__((aligned(4)));
    uint16_t seen;
    uint16_t number;
    uint64_t device;
} __attribute__((aligned(16)));

static inline uint32_t get32(uint64_t at) { return *(volatile uint32_t *)at; }
static inline void set32(uint64_t at, uint32_t value) { *(volatile uint32_t *)at = value; }
static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }

static inline uint64_t hex(const char *text) {
    uint64_t value = 0;
    for (;; text++) {
        if (*text >= '0' && *text <= '9')
            value = value * 16 + (uint64_t)(*text - '0');
        else if (*text >= 'a' && *text <= 'f')
            value = value * 16 + (uint64_t)(*text - 'a' + 10);
        else
            return value;
    }
}

/* The base address of the n-th device of a kind; 0 if there is none. "virtio_mmio.device=4K@0xd0000000:5". */
static inline uint64_t find_device(const char *line, uint32_t id, int nth) {
    for (; *line; line++) {
        if (!starts_with(line, "virtio_mmio.device="))
            continue;
        while (*line && *line != '@')
            line++;
        uint64_t base = hex(line + 3);
        if (get32(base + MAGIC) == 0x74726976 && get32(base + DEVICE_ID) == id && nth-- == 0)
            return base;
    }
    return 0;
}

/* Resets a device and accepts VIRTIO_F_VERSION_1 and these of its first 32 features. Firecracker takes one status bit at
   a time. */
static inline void begin_device(uint64_t device, uint32_t features) {
    set32(device + STATUS, 0);
    set32(device + STATUS, 1);
    set32(device + STATUS, 1 | 2);
    set32(device + DEVICE_FEATURES_SEL, 0);
    features &= get32(device + DEVICE_FEATURES);
    set32(device + DRIVER_FEATURES_SEL, 0);
    set32(device + DRIVER_FEATURES, features);
    set32(device + DRIVER_FEATURES_SEL, 1);
    set32(device + DRIVER_FEATURES, 1);
    set32(device + STATUS, 1 | 2 | 8);
}

static inline void set_address(uint64_t at, const volatile void *address) {
    set32(at, (uint32_t)(uint64_t)address);
    set32(at + 4, (uint32_t)((uint64_t)address >> 32));
}

static inline void begin_queue(uint64_t device, uint16_t number, struct queue *queue) {
    queue->device = device;
    queue->number = number;
    set32(device + QUEUE_SEL, number);
    set32(device + QUEUE_NUM, QUEUE_SIZE);
    set_address(device + QUEUE_DESC, queue->descriptors);
    set_address(device + QUEUE_DRIVER, &queue->available);
    set_address(device + QUEUE_DEVICE, &queue->used);
    set32(device + QUEUE_READY, 1);
}

static inline void finish_device(uint64_t device) { set32(device + STATUS, 1 | 2 | 8 | 4); }

static inline void describe(struct queue *queue, uint16_t at, void *memory, uint32_t length, uint16_t flags) {
    queue->descriptors[at].address = (uint64_t)memory;
    queue->descriptors[at].length = length;
    queue->descriptors[at].flags = flags;
    queue->descriptors[at].next = (uint16_t)(at + 1);
}

/* Hands the chain that begins at a descriptor to the device. */
static inline void offer(struct queue *queue, uint16_t head) {
    queue->available.ring[queue->available.index % QUEUE_SIZE] = head;
    barrier();
    queue->available.index++;
    barrier();
    set32(queue->device + QUEUE_NOTIFY, queue->number);
}

/* What the device is done with: the head of a chain, and how many bytes were written. -1 if there is nothing. */
static inline int taken(struct queue *queue, uint32_t *length) {
    barrier();
    if (queue->used.index == queue->seen)
        return -1;
    uint16_t at = queue->seen++ % QUEUE_SIZE;
    *length = queue->used.ring[at].length;
    return (int)queue->used.ring[at].id;
}

/* Ends when asked to; otherwise comes back at once. */
static inline void look_up(void) {
    if (asked_to_end())
        power_off();
}

static inline uint32_t wait_for(struct queue *queue) {
    uint32_t length;
    while (taken(queue, &length) < 0)
        look_up();
    return length;
}

#endif
