//! One FUSE request in, one answer out (fuse(4), `include/uapi/linux/fuse.h`).
//!
//! Node numbers carry all state: a process that takes over a connection can answer requests about files that it has
//! never heard of. Nothing in an image ever changes, so the kernel may keep every answer, also that a name does not
//! exist. The one thing that grows is the list of views in the root of a stage.

mod list;

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, EntryOut, FsOptions, GetxattrIn, GetxattrOut, InHeader, InitIn, InitOut,
    Kstatfs, Opcode, OutHeader, ReadIn, StatfsOut,
};
use vm_memory::ByteValued;

use list::Style;

use super::idle::Idle;
use super::tree::{Place, Stat};
use super::views::{Spot, View, ViewId};
use super::{Owner, Server};
use crate::error::Error;
use crate::file::Piece;
use crate::format::{Kind, NAME_MAX};

/// Protocol spoken: that of Linux 5.4. Newer kernels speak it too.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
/// The node that a mount shows.
const ROOT: u64 = 1;
/// For ever, in seconds: what the kernel's clocks can hold.
const FOREVER_S: u64 = 1 << 30;
/// Bytes that the kernel reads ahead or asks for at once, at most; a user's mount gets less.
const READ_MAX: u32 = 1 << 20;
/// Bytes of a page; where they are larger, the kernel uses its own limit.
const PAGE: u32 = 4096;
/// Requests that the kernel sends without being waited for, at most.
const BACKGROUND: u16 = 64;
/// Bit of a node number: a file of the image.
const IMAGE: u64 = 1 << 62;
/// Bit of a node number: a file that a view adds.
const MADE: u64 = 1 << 63;
/// Bits of a node number for the view: enough for as many as there can be.
const VIEW_BITS: u32 = 12;
/// Where inode numbers of added files begin: squashfs has 32 bits.
const MADE_INODES: u64 = 1 << 50;
/// Begins the name of an attribute that is for the machine's administrator.
const TRUSTED: &[u8] = b"trusted.";
/// Bytes of a symlink target that the kernel takes: a page without its last byte.
const TARGET_MAX: usize = PAGE as usize - 1;

/// Whether the kernel waits for an answer.
pub(super) enum Answer {
    Write,
    None,
}

/// An answer being made. Its memory is used again.
#[derive(Default)]
pub(super) struct Reply {
    unique: u64,
    errno: i32,
    pub(super) bytes: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
}

impl Reply {
    fn start(&mut self, unique: u64) {
        self.unique = unique;
        self.errno = 0;
        self.bytes.clear();
        self.pieces.clear();
    }

    /// Becomes an error.
    pub(super) fn fail(&mut self, request: &[u8], errno: i32) -> Answer {
        self.start(take::<InHeader>(request).map_or(0, |(header, _)| header.unique));
        self.errno = errno;
        Answer::Write
    }

    /// Lets go of the blocks.
    pub(super) fn release(&mut self) {
        self.pieces.clear();
    }

    pub(super) fn header(&self) -> [u8; size_of::<OutHeader>()] {
        let pieces: usize = self.pieces.iter().map(Piece::len).sum();
        let header = OutHeader {
            len: (size_of::<OutHeader>() + self.bytes.len() + pieces) as u32,
            error: -self.errno,
            unique: self.unique,
        };
        let mut raw = [0; size_of::<OutHeader>()];
        raw.copy_from_slice(header.as_slice());
        raw
    }

    fn push(&mut self, part: &impl ByteValued) {
        self.bytes.extend_from_slice(part.as_slice());
    }
}

/// Why a request is refused.
struct Refusal(i32);

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal(error.errno())
    }
}

type Outcome<T = ()> = Result<T, Refusal>;

/// Takes a structure off the front; the kernel aligns it, but nothing here relies on that.
fn take<T: ByteValued + Default>(raw: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = raw.split_at_checked(size_of::<T>())?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(head);
    Some((value, rest))
}

fn parse<T: ByteValued + Default>(raw: &[u8]) -> Outcome<(T, &[u8])> {
    take(raw).ok_or(Refusal(libc::EINVAL))
}

/// The name at the end of a request, without its NUL.
fn name(raw: &[u8]) -> Outcome<&[u8]> {
    let end = raw.iter().position(|byte| *byte == 0);
    end.map(|end| &raw[..end]).ok_or(Refusal(libc::EINVAL))
}

/// What a node number means.
#[derive(Clone, Copy)]
enum Node {
    /// The directory of views.
    Stage,
    /// A file in a view.
    In(ViewId, Spot),
}

fn node_number(view: ViewId, spot: Spot, kind: Kind) -> u64 {
    match spot {
        Spot::Made(index) => MADE | u64::from(view.0) << 32 | u64::from(index),
        // Other files than directories are the same in all views, so that they share the page cache.
        Spot::Image(at) if kind == Kind::Dir => IMAGE | u64::from(view.0) << Place::BITS | at.0,
        Spot::Image(at) => IMAGE | at.0,
    }
}

impl Server {
    fn node(&self, number: u64) -> Outcome<Node> {
        if number == ROOT {
            return Ok(match self.options.stage {
                true => Node::Stage,
                false => Node::In(ViewId(0), Spot::Image(self.tree.root())),
            });
        }
        if number & MADE != 0 {
            let view = ((number & !MADE) >> 32) as u32;
            return Ok(Node::In(ViewId(view), Spot::Made(number as u32)));
        }
        if number & IMAGE == 0 {
            return Err(Refusal(libc::ESTALE));
        }
        let view = (number >> Place::BITS) as u32 & ((1 << VIEW_BITS) - 1);
        let at = Place(number & ((1 << Place::BITS) - 1));
        Ok(Node::In(ViewId(view), Spot::Image(at)))
    }

    fn view(&self, id: ViewId) -> Outcome<std::sync::Arc<View>> {
        self.views.find(id).ok_or(Refusal(libc::ESTALE))
    }

    /// A file of the image, whose content is the same in all views.
    fn image_file(&self, number: u64) -> Outcome<Option<Place>> {
        match self.node(number)? {
            Node::In(_, Spot::Image(at)) => Ok(Some(at)),
            _ => Ok(None),
        }
    }

    /// Answers a request.
    pub(super) fn handle(&self, request: &[u8], reply: &mut Reply) -> Answer {
        const FORGET: u32 = Opcode::Forget as u32;
        const BATCH_FORGET: u32 = Opcode::BatchForget as u32;
        const INTERRUPT: u32 = Opcode::Interrupt as u32;
        let Some((header, body)) = take::<InHeader>(request) else {
            return Answer::None;
        };
        // Nodes hold no state that could be forgotten, and no request takes long enough to interrupt it.
        if matches!(header.opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            return Answer::None;
        }
        reply.start(header.unique);
        Idle::note(&self.idle);
        match self.dispatch(&header, body, reply) {
            Ok(()) => Answer::Write,
            Err(Refusal(errno)) => reply.fail(request, errno),
        }
    }

    fn dispatch(&self, header: &InHeader, body: &[u8], reply: &mut Reply) -> Outcome {
        const LOOKUP: u32 = Opcode::Lookup as u32;
        const GETATTR: u32 = Opcode::Getattr as u32;
        const READLINK: u32 = Opcode::Readlink as u32;
        const READ: u32 = Opcode::Read as u32;
        const READDIR: u32 = Opcode::Readdir as u32;
        const READDIRPLUS: u32 = Opcode::Readdirplus as u32;
        const GETXATTR: u32 = Opcode::Getxattr as u32;
        const LISTXATTR: u32 = Opcode::Listxattr as u32;
        const STATFS: u32 = Opcode::Statfs as u32;
        const INIT: u32 = Opcode::Init as u32;
        const OPEN: u32 = Opcode::Open as u32;
        const OPENDIR: u32 = Opcode::Opendir as u32;
        const DESTROY: u32 = Opcode::Destroy as u32;
        let number = header.nodeid;
        match header.opcode {
            LOOKUP => self.lookup(number, name(body)?, reply),
            GETATTR => self.getattr(number, reply),
            READLINK => self.readlink(number, reply),
            READ => self.read(number, &parse(body)?.0, reply),
            READDIR => self.readdir(number, &parse(body)?.0, Style::Names, reply),
            READDIRPLUS => self.readdir(number, &parse(body)?.0, Style::Entries, reply),
            GETXATTR => {
                let (asked, rest): (GetxattrIn, _) = parse(body)?;
                self.getxattr(number, asked.size, name(rest)?, reply)
            }
            LISTXATTR => self.listxattr(number, parse::<GetxattrIn>(body)?.0.size, reply),
            STATFS => self.statfs(reply),
            INIT => init(&parse(body)?.0, reply),
            DESTROY => Ok(()),
            // The kernel then opens files without asking, and keeps what it has read; so we hold no handles.
            OPEN | OPENDIR => Err(Refusal(libc::ENOSYS)),
            // Includes LSEEK, for which the kernel then sees no holes. Permissions it decides by itself (see `mount`).
            _ => Err(Refusal(libc::ENOSYS)),
        }
    }

    fn lookup(&self, parent: u64, name: &[u8], reply: &mut Reply) -> Outcome {
        if name.len() > NAME_MAX {
            return Err(Refusal(libc::ENAMETOOLONG));
        }
        let (id, spot) = match self.node(parent)? {
            // Not to be kept: the view may be made later.
            Node::Stage => (
                self.staged(name).ok_or(Refusal(libc::ENOENT))?,
                Some(Spot::Image(self.tree.root())),
            ),
            Node::In(id, dir) => (id, self.view(id)?.lookup(&self.tree, dir, name)?),
        };
        let entry = match spot {
            Some(spot) => {
                self.habits.looked_up();
                self.entry(id, spot)?
            }
            // Node 0 means: no such name, and this may be kept.
            None => EntryOut {
                entry_valid: FOREVER_S,
                ..EntryOut::default()
            },
        };
        reply.push(&entry);
        Ok(())
    }

    /// The view that a name in the root of a stage means.
    fn staged(&self, name: &[u8]) -> Option<ViewId> {
        let number: u32 = std::str::from_utf8(name).ok()?.parse().ok()?;
        let is_canonical = number.to_string().as_bytes() == name;
        (is_canonical && number < self.views.count()).then_some(ViewId(number))
    }

    fn entry(&self, id: ViewId, spot: Spot) -> Outcome<EntryOut> {
        let (kind, attr) = self.attr(id, spot)?;
        Ok(EntryOut {
            nodeid: node_number(id, spot, kind),
            entry_valid: FOREVER_S,
            attr_valid: FOREVER_S,
            attr,
            ..EntryOut::default()
        })
    }

    fn attr(&self, id: ViewId, spot: Spot) -> Outcome<(Kind, Attr)> {
        let stat = match spot {
            Spot::Image(at) => self.tree.stat(at)?,
            Spot::Made(index) => self.made_stat(id, index)?,
        };
        Ok((stat.kind, self.show(&stat)))
    }

    fn made_stat(&self, id: ViewId, index: u32) -> Outcome<Stat> {
        let view = self.view(id)?;
        let made = view.made(index).ok_or(Refusal(libc::ESTALE))?;
        let is_dir = made.kind == Kind::Dir;
        Ok(Stat {
            kind: made.kind,
            mode: if is_dir { 0o755 } else { 0o644 },
            nlink: if is_dir { 2 } else { 1 },
            size: 0,
            blocks: 0,
            rdev: 0,
            number: made_number(id, index),
            ..self.tree.stat(self.tree.root())?
        })
    }

    fn show(&self, stat: &Stat) -> Attr {
        let (uid, gid) = match self.options.owner {
            Owner::Fixed { uid, gid } => (uid, gid),
            Owner::Image => (stat.uid, stat.gid),
        };
        let (seconds, nanoseconds) = (stat.mtime.0 as u64, stat.mtime.1);
        Attr {
            ino: stat.number,
            size: stat.size,
            blocks: stat.blocks,
            atime: seconds,
            mtime: seconds,
            ctime: seconds,
            atimensec: nanoseconds,
            mtimensec: nanoseconds,
            ctimensec: nanoseconds,
            mode: stat.kind.mode_bits() | stat.mode,
            nlink: stat.nlink,
            uid,
            gid,
            rdev: stat.rdev,
            blksize: self.tree.usage().block_size,
            flags: 0,
        }
    }

    fn getattr(&self, number: u64, reply: &mut Reply) -> Outcome {
        let attr = match self.node(number)? {
            Node::In(id, spot) => self.attr(id, spot)?.1,
            Node::Stage => self.show(&Stat {
                number: MADE_INODES - 1,
                ..self.tree.stat(self.tree.root())?
            }),
        };
        reply.push(&AttrOut {
            attr_valid: FOREVER_S,
            attr,
            ..AttrOut::default()
        });
        Ok(())
    }

    fn readlink(&self, number: u64, reply: &mut Reply) -> Outcome {
        let at = self.image_file(number)?.ok_or(Refusal(libc::EINVAL))?;
        let target = self.tree.read_link(at)?;
        if target.len() > TARGET_MAX {
            return Err(Refusal(libc::ENAMETOOLONG));
        }
        reply.bytes.extend_from_slice(&target);
        Ok(())
    }

    fn read(&self, number: u64, asked: &ReadIn, reply: &mut Reply) -> Outcome {
        // Added files are empty.
        let Some(at) = self.image_file(number)? else {
            return Ok(());
        };
        let len = asked.size.min(READ_MAX) as usize;
        let found = self.tree.pieces(at, asked.offset, len, &mut reply.pieces)?;
        if let Some(ahead) = &self.ahead {
            ahead.note(at, asked.offset, len, &found);
        }
        Ok(())
    }

    fn getxattr(&self, number: u64, size: u32, name: &[u8], reply: &mut Reply) -> Outcome {
        if !self.tree.has_xattrs() {
            // The kernel stops asking.
            return Err(Refusal(libc::ENOSYS));
        }
        check_class(name)?;
        let value = match self.image_file(number)? {
            Some(at) => self.tree.xattr(at, name)?,
            None => None,
        };
        answer_sized(&value.ok_or(Refusal(libc::ENODATA))?, size, reply)
    }

    fn listxattr(&self, number: u64, size: u32, reply: &mut Reply) -> Outcome {
        if !self.tree.has_xattrs() {
            return Err(Refusal(libc::ENOSYS));
        }
        let names = match self.image_file(number)? {
            Some(at) => without_trusted(self.tree.xattr_names(at)?),
            None => Vec::new(),
        };
        answer_sized(&names, size, reply)
    }

    fn statfs(&self, reply: &mut Reply) -> Outcome {
        let usage = self.tree.usage();
        let st = Kstatfs {
            blocks: usage.bytes.div_ceil(u64::from(usage.block_size)),
            files: usage.files,
            bsize: usage.block_size,
            frsize: usage.block_size,
            namelen: NAME_MAX as u32,
            ..Kstatfs::default()
        };
        reply.push(&StatfsOut { st });
        Ok(())
    }
}

fn made_number(id: ViewId, index: u32) -> u64 {
    MADE_INODES | u64::from(id.0) << 32 | u64::from(index)
}

/// Refuses names of attributes that a file of an image cannot have, as the kernel's squashfs does (xattr(7)).
fn check_class(name: &[u8]) -> Outcome {
    let classes: [&[u8]; 3] = [b"user.", TRUSTED, b"security."];
    match classes.iter().find_map(|class| name.strip_prefix(*class)) {
        Some(b"") => Err(Refusal(libc::EINVAL)),
        Some(_) => Ok(()),
        None => Err(Refusal(libc::EOPNOTSUPP)),
    }
}

/// Names that the programs of a user namespace may read. Others are for the machine's administrator alone (xattr(7)): the
/// kernel says of them that they are not there, and so they are not listed either.
fn without_trusted(names: Vec<u8>) -> Vec<u8> {
    let names = names.split_inclusive(|byte| *byte == 0);
    names
        .filter(|name| !name.starts_with(TRUSTED))
        .flatten()
        .copied()
        .collect()
}

/// Answers with a value or, when asked with size 0, with its length.
fn answer_sized(value: &[u8], size: u32, reply: &mut Reply) -> Outcome {
    match size {
        0 => reply.push(&GetxattrOut {
            size: value.len() as u32,
            padding: 0,
        }),
        size if value.len() > size as usize => return Err(Refusal(libc::ERANGE)),
        _ => reply.bytes.extend_from_slice(value),
    }
    Ok(())
}

fn init(asked: &InitIn, reply: &mut Reply) -> Outcome {
    if asked.major < MAJOR {
        return Err(Refusal(libc::EPROTO));
    }
    let wanted = FsOptions::ASYNC_READ
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::CACHE_SYMLINKS
        | FsOptions::MAX_PAGES
        | FsOptions::ZERO_MESSAGE_OPEN
        | FsOptions::ZERO_MESSAGE_OPENDIR;
    reply.push(&InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead: asked.max_readahead.max(READ_MAX),
        flags: asked.flags & wanted.bits() as u32,
        max_background: BACKGROUND,
        congestion_threshold: BACKGROUND / 4 * 3,
        max_write: PAGE,
        time_gran: 1,
        max_pages: (READ_MAX / PAGE) as u16,
        ..InitOut::default()
    });
    Ok(())
}
