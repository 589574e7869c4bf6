/* Drives the vsock (virtio 1.2, 5.10): accepts a connection to any port, and sends back what it is sent. */
#include "virtio.h"

#define BUFFER 4096

enum { REQUEST = 1, RESPONSE = 2, RESET = 3, SHUTDOWN = 4, DATA = 5, CREDIT_UPDATE = 6, CREDIT_REQUEST = 7 };

struct header {
    uint64_t source, target;
    uint32_t source_port, target_port, length;
    uint16_t type, operation;
    uint32_t flags, buffer, forwarded;
} __attribute__((packed));

static struct queue receive, send, events;
static uint8_t packets[4][BUFFER];
static uint8_t answer[BUFFER];
static uint32_t forwarded;

static void reply(const struct header *to, uint16_t operation, uint32_t length) {
    struct header *header = (struct header *)answer;
    header->source = to->target;
    header->target = to->source;
    header->source_port = to->target_port;
    header->target_port = to->source_port;
    header->length = length;
    header->type = 1;
    header->operation = operation;
    header->flags = 0;
    header->buffer = 65536;
    header->forwarded = forwarded;
    describe(&send, 0, answer, (uint32_t)sizeof *header, length ? DESC_NEXT : 0);
    describe(&send, 1, answer + sizeof *header, length, 0);
    offer(&send, 0);
    wait_for(&send);
}

static void handle(const uint8_t *packet) {
    const struct header *header = (const struct header *)packet;
    switch (header->operation) {
    case REQUEST:
        forwarded = 0;
        reply(header, RESPONSE, 0);
        break;
    case DATA:
        forwarded += header->length;
        memcpy(answer + sizeof *header, packet + sizeof *header, header->length);
        reply(header, DATA, header->length);
        break;
    case CREDIT_REQUEST:
        reply(header, CREDIT_UPDATE, 0);
        break;
    case SHUTDOWN:
        reply(header, RESET, 0);
        break;
    }
}

void guest_main(const char *command_line) {
    uint64_t device = find_device(command_line, ID_VSOCK, 0);
    if (!device) {
        print("no vsock\r\n");
        power_off();
    }
    begin_device(device, 0);
    begin_queue(device, 0, &receive);
    begin_queue(device, 1, &send);
    begin_queue(device, 2, &events);
    finish_device(device);
    for (uint16_t i = 0; i < 4; i++) {
        describe(&receive, i, packets[i], BUFFER, DESC_WRITE);
        offer(&receive, i);
    }
    report("cid", get32(device + CONFIG));
    for (;;) {
        uint32_t length;
        int head = taken(&receive, &length);
        look_up();
        if (head < 0)
            continue;
        handle(packets[head]);
        offer(&receive, (uint16_t)head);
    }
}
