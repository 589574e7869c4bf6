/* The first network card (virtio 1.2, 5.1). Frames are built in `answer` behind its header. */
#ifndef NET_H
#define NET_H

#include "virtio.h"

#define HEADER 12
/* Firecracker hands over a frame of its own service only where 64 KiB could be taken. */
#define FRAME 9216
#define FRAMES 8

static struct queue receive, send;
static uint8_t frames[FRAMES][FRAME];
static uint8_t answer[2048];
static uint8_t own[6];

/* Its address is read into `own`; ends if there is none. */
static inline void begin_card(const char *command_line) {
    uint64_t device = find_device(command_line, ID_NET, 0);
    if (!device) {
        print("no card\r\n");
        power_off();
    }
    begin_device(device, 1 << 5);
    begin_queue(device, 0, &receive);
    begin_queue(device, 1, &send);
    finish_device(device);
    for (int i = 0; i < 6; i++)
        own[i] = *(volatile uint8_t *)(device + CONFIG + (uint64_t)i);
    for (uint16_t i = 0; i < FRAMES; i++) {
        describe(&receive, i, frames[i], FRAME, DESC_WRITE);
        offer(&receive, i);
    }
}

static inline void transmit(uint32_t length) {
    memset(answer, 0, HEADER);
    describe(&send, 0, answer, HEADER + length, 0);
    offer(&send, 0);
    wait_for(&send);
}

/* What came: which frame, and how long it is. -1 if nothing did. The frame is the card's again after `give_back`. */
static inline int frame_taken(uint32_t *length) {
    int head = taken(&receive, length);
    look_up();
    *length -= HEADER;
    return head;
}

static inline void give_back(int head) { offer(&receive, (uint16_t)head); }

/* The sum of 16-bit words that IP, ICMP and TCP carry complemented (RFC 1071). */
static inline uint32_t sum_of(const uint8_t *bytes, uint32_t length, uint32_t sum) {
    for (uint32_t at = 0; at < length; at++)
        sum += at % 2 ? bytes[at] : (uint32_t)bytes[at] << 8;
    return sum;
}

static inline void set16(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void set_sum(uint8_t *at, uint32_t sum) {
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    set16(at, ~sum);
}

#endif
