/* Prints the address of its network card, answers ARP for whatever is asked, and echo requests (ICMP). */
#include "net.h"

static void print_hex(uint8_t byte) {
    put("0123456789abcdef"[byte >> 4]);
    put("0123456789abcdef"[byte & 15]);
}

static void answer_arp(const uint8_t *frame) {
    uint8_t *to = answer + HEADER;
    memcpy(to, frame, 42);
    memcpy(to, frame + 6, 6);
    memcpy(to + 6, own, 6);
    to[21] = 2;
    memcpy(to + 22, own, 6);
    memcpy(to + 28, frame + 38, 4);
    memcpy(to + 32, frame + 22, 10);
    transmit(42);
}

static void answer_echo(const uint8_t *frame, uint32_t length) {
    uint8_t *to = answer + HEADER;
    memcpy(to, frame, length);
    memcpy(to, frame + 6, 6);
    memcpy(to + 6, own, 6);
    memcpy(to + 26, frame + 30, 4);
    memcpy(to + 30, frame + 26, 4);
    to[34] = 0;
    set16(to + 36, 0);
    set_sum(to + 36, sum_of(to + 34, ((uint32_t)to[16] << 8 | to[17]) - 20, 0));
    transmit(length);
}

void guest_main(const char *command_line) {
    begin_card(command_line);
    print("mac=");
    for (int i = 0; i < 6; i++)
        print_hex(own[i]);
    print("\r\n");
    for (;;) {
        uint32_t length = 0;
        int head = frame_taken(&length);
        if (head < 0)
            continue;
        const uint8_t *frame = frames[head] + HEADER;
        if (frame[12] == 8 && frame[13] == 6 && frame[21] == 1)
            answer_arp(frame);
        else if (frame[12] == 8 && frame[13] == 0 && frame[14] == 0x45 && frame[23] == 1 && frame[34] == 8)
            answer_echo(frame, length);
        give_back(head);
    }
}
