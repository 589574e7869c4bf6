//! A guest of one disk sector that counts, dirties its memory, writes to its disk, and notices when either is wrong.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// What it prints first, with the count that it found on its disk.
const GREETING: &str = "mover-guest: from ";
/// What it prints when a page or a sector is not what it wrote there; then it stands still.
const WRONG: &str = "memory or disk is wrong";
/// The file of its image.
pub(super) const IMAGE_FILE: &str = "mover.raw";
/// How often it keeps its count on its disk.
const KEPT_EVERY: u64 = 8;
/// The size of its disk, all but the first megabyte of which is only there to be copied.
const DISK_BYTES: usize = 8 << 20;

/// Its boot sector. It fills 12 MiB of memory, then goes round for ever: each page of 2 MiB must hold the number of the
/// last round and gets that of the next, one page of the 12 MiB is looked at, what is typed is echoed, and at each timer
/// tick (18 a second) the count goes up by one, is written to sector 1000 if it is a multiple of eight, and is printed as a line
/// `n=COUNT`. It powers off when the button is pressed. Assembled from (AT&T syntax: `as --32`, `ld -Ttext 0x7c00 --oformat binary`):
///
/// ```text
/// start: xorw %ax,%ax; movw %ax,%ds; movw %ax,%ss; movw $0x7c00,%sp; cld; movb %dl,drive; sti
///  movw $0x3fa,%dx; movb $1,%al; outb %al,%dx; movw $0x602,%dx; movw $0x100,%ax; outw %ax,%dx; call flat
///  movb $0x42,%ah; call disk; movl 0x804,%eax; cmpl $0x564d5648,%eax; jne fresh; movl 0x800,%eax; movl %eax,count
/// fresh: movw $hello,%si; call print; call number; movl $0x1000000,%edi
/// fill: movl %edi,%es:(%edi); addl $0x1000,%edi; cmpl $0x1c00000,%edi; jb fill
/// round: movl rounds,%ebx; leal 1(%ebx),%eax; movl %eax,rounds; movl $0x400000,%edi
/// page: cmpl %ebx,%es:(%edi); jne bad; movl %eax,%es:(%edi); addl $0x1000,%edi; cmpl $0x600000,%edi; jb page
///  movl next,%edi; cmpl %edi,%es:(%edi); jne bad; addl $0x1000,%edi; cmpl $0x1c00000,%edi; jb more; movl $0x1000000,%edi
/// more: movl %edi,next; movw $0x3fd,%dx; inb %dx,%al; testb $1,%al; jz quiet; movw $0x3f8,%dx; inb %dx,%al; call put
/// quiet: movw $0x600,%dx; inw %dx,%ax; testb $1,%ah; jnz off; movl 0x46c,%eax; cmpl tick,%eax; je round; movl %eax,tick
///  incl count; testb $7,count; jnz say; movl count,%eax; movl %eax,0x800; movl $0x564d5648,0x804; movb $0x43,%ah; call disk
/// say: movw $is,%si; call print; call number; jmp round
/// bad: movw $wrong,%si; call print
/// dead: hlt; jmp dead
/// off: movw $0x604,%dx; movw $0x2000,%ax; outw %ax,%dx; hlt; jmp off
/// flat: cli; lgdtl gdtr; movl %cr0,%eax; orb $1,%al; movl %eax,%cr0; movw $8,%bx; movw %bx,%es; andb $0xfe,%al
///  movl %eax,%cr0; xorw %bx,%bx; movw %bx,%es; sti; ret
/// disk: xorb %al,%al; movb drive,%dl; movw $dap,%si; int $0x13; jc bad; jmp flat
/// number: movl count,%eax; xorw %cx,%cx; movl $10,%ebx
/// digit: xorl %edx,%edx; divl %ebx; pushw %dx; incw %cx; testl %eax,%eax; jnz digit
/// tell: popw %ax; addb $0x30,%al; call put; loop tell; movw $end,%si
/// print: lodsb; testb %al,%al; jz done; call put; jmp print
/// put: pushw %ax
/// wait: movw $0x3fd,%dx; inb %dx,%al; testb $0x20,%al; jz wait; popw %ax; movw $0x3f8,%dx; outb %al,%dx
/// done: ret
/// gdt: .quad 0, 0x00cf92000000ffff
/// gdtr: .word 15; .long gdt
/// dap: .byte 0x10, 0; .word 1, 0x800, 0; .quad 1000
/// count: .long 0; rounds: .long 0; tick: .long 0; next: .long 0x1000000; drive: .byte 0
/// hello: .asciz "mover-guest: from "; is: .asciz "n="; wrong: .asciz "memory or disk is wrong\r\n"; end: .asciz "\r\n"
/// ```
const SECTOR: &str = "31c08ed88ed0bc007cfc8816be7dfbbafa03b001eeba0206b80001efe8fe00b442e8180166a10408663d48564d56750866a1000866a3ae7d\
bebf7de83101e80a0166bf00000001266766893f6681c7001000006681ff0000c00172eb668b1eb27d67668d430166a3b27d66bf00004000\
266766391f0f85910026676689076681c7001000006681ff0000600072e2668b3eba7d266766393f75706681c7001000006681ff0000c001\
720666bf0000000166893eba7dbafd03eca8017407baf803ece8b500ba0006edf6c401754666a16c04663b06b67d748466a3b67d66ff06ae\
7df606ae7d07751666a1ae7d66a3000866c706040848564d56b443e83e00bed27de86b00e84400e952ffbed57de85f00f4ebfdba0406b800\
20eff4ebf6fa660f0116987d0f20c00c010f22c0bb08008ec324fe0f22c031db8ec3fbc330c08a16be7dbe9e7dcd1372c1ebd266a1ae7d31\
c966bb0a0000006631d266f7f352416685c075f3580430e80f00e2f8beef7dac84c07413e80200ebf650bafd03eca82074f858baf803eec3\
0000000000000000ffff00000092cf000f00887d00001000010000080000e80300000000000000000000000000000000000000000001006d\
6f7665722d67756573743a2066726f6d20006e3d006d656d6f7279206f72206469736b2069732077726f6e670d0a000d0a00";

/// Its disk.
pub(super) fn disk() -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or_default() as u8;
    let mut disk: Vec<u8> =
        SECTOR.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    disk.resize(1 << 20, 0);
    // Nothing that a copy could leave out.
    disk.extend((0..DISK_BYTES - (1 << 20)).map(|at| (at / 509 % 255) as u8 + 1));
    disk
}

/// Writes its disk as the image `mover` of a directory.
pub(super) fn put_image(dir: &Path) -> Result<()> {
    Ok(std::fs::write(dir.join(IMAGE_FILE), disk())?)
}

/// What its consoles say, of all its processes one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// How far it has counted.
    pub(super) count: u64,
    /// How often it began anew from its disk.
    pub(super) restarts: usize,
}

/// Reads what the consoles say: each number is the last one and one more, as one copy prints them that runs on; or, after a
/// start from its disk, goes on from what was last kept there.
///
/// # Errors
/// It is not so.
pub(super) fn unbroken(text: &str) -> Result<Told> {
    ensure!(!text.contains(WRONG), "what it had in memory or on its disk is not there any more:\n{text}");
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut told: Option<Told> = None;
    for line in complete.lines() {
        // A copy that is killed leaves half a line, after which the next one prints.
        if let Some((_, from)) = line.split_once(GREETING) {
            let from: u64 = from.trim().parse().with_context(|| format!("{line:?}"))?;
            let Some(before) = told else {
                ensure!(from == 0, "a new guest finds {from} on its disk");
                told = Some(Told::default());
                continue;
            };
            // What it keeps it prints a moment later.
            let kept = from <= before.count + 1 && from + 2 * KEPT_EVERY > before.count;
            ensure!(kept, "it had counted to {}, and found {from} on its disk:\n{text}", before.count);
            told = Some(Told { count: from, restarts: before.restarts + 1 });
        } else if let Some((_, number)) = line.rsplit_once("n=") {
            let number: u64 = number.trim().parse().with_context(|| format!("{line:?}"))?;
            let before = told.context("it counts before it greets")?;
            ensure!(number == before.count + 1, "after {} it counts {number}:\n{text}", before.count);
            told = Some(Told { count: number, ..before });
        }
    }
    Ok(told.unwrap_or_default())
}

#[test]
fn a_gap_in_what_the_guest_counts_is_seen() {
    let fine = "mover-guest: from 0\r\nn=1\r\nn=2\r\n~n=3\r\nn=mover-guest: from 0\r\nn=1\r\nn";
    assert_eq!(unbroken(fine).expect("it is fine"), Told { count: 1, restarts: 1 });
    for bad in [
        "mover-guest: from 0\r\nn=1\r\nn=3\r\n",
        "mover-guest: from 0\r\nn=1\r\nn=1\r\n",
        "mover-guest: from 0\r\nn=1\r\nmover-guest: from 8\r\n",
        "mover-guest: from 0\r\nmemory or disk is wrong\r\n",
        "n=1\r\n",
    ] {
        assert!(unbroken(bad).is_err(), "{bad:?}");
    }
}
