//! Listings (`READDIR`, `READDIRPLUS`).

use fuse_backend_rs::abi::fuse_abi::{Dirent, EntryOut, ReadIn};

use super::{MADE_INODES, Node, Outcome, Refusal, Reply, made_number};
use crate::format::Kind;
use crate::server::Server;
use crate::server::tree::Entry;
use crate::server::views::{Spot, ViewId};

/// Bytes of an answer that lists names, at most.
const LIST_MAX: usize = 1 << 20;

/// How names are listed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Names, inode numbers and kinds.
    Names,
    /// All that a lookup would answer.
    Entries,
    /// As `Entries`, with those of all but directories left empty: the kernel then looks up what it needs.
    Bare,
}

/// An answer that lists names.
struct List<'a> {
    max: usize,
    style: Style,
    reply: &'a mut Reply,
    /// Names added that were left without an entry.
    names: u32,
}

impl List<'_> {
    /// Adds a name, if there is room; `next` is the place behind it.
    fn add(
        &mut self,
        name: &[u8],
        next: u64,
        (number, kind): (u64, Kind),
        entry: impl FnOnce() -> EntryOut,
    ) -> bool {
        let plus = match self.style {
            Style::Names => 0,
            Style::Entries | Style::Bare => size_of::<EntryOut>(),
        };
        let len = (plus + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        let end = self.reply.bytes.len() + len;
        if end > self.max {
            return false;
        }
        match self.style {
            Style::Names => {}
            Style::Entries => self.reply.push(&entry()),
            // Whoever walks a tree goes on into its directories.
            Style::Bare if kind == Kind::Dir => self.reply.push(&entry()),
            Style::Bare => {
                self.names += 1;
                self.reply.push(&EntryOut::default());
            }
        }
        self.reply.push(&Dirent {
            ino: number,
            off: next,
            namelen: name.len() as u32,
            type_: kind.mode_bits() >> 12,
        });
        self.reply.bytes.extend_from_slice(name);
        self.reply.bytes.resize(end, 0);
        true
    }

    /// Adds `.` and `..` unless the place `from` is behind them. They have no entry: the kernel knows them.
    fn dots(&mut self, from: u64, own: u64, parent: u64) -> bool {
        (from >= 1 || self.add(b".", 1, (own, Kind::Dir), EntryOut::default))
            && (from >= 2 || self.add(b"..", 2, (parent, Kind::Dir), EntryOut::default))
    }
}

impl Server {
    pub(super) fn readdir(
        &self,
        number: u64,
        asked: &ReadIn,
        style: Style,
        reply: &mut Reply,
    ) -> Outcome {
        let mut list = List {
            max: (asked.size as usize).min(LIST_MAX),
            style,
            reply,
            names: 0,
        };
        if style == Style::Entries && !self.habits.wants_attributes() {
            list.style = Style::Bare;
        }
        match self.node(number)? {
            Node::Stage => self.list_stage(asked.offset, &mut list)?,
            Node::In(id, spot) => self.list_view(id, spot, asked.offset, &mut list)?,
        }
        if list.style != Style::Entries {
            self.habits.listed_bare(list.names);
        }
        Ok(())
    }

    fn list_stage(&self, from: u64, list: &mut List<'_>) -> Outcome {
        let own = MADE_INODES - 1;
        if !list.dots(from, own, own) {
            return Ok(());
        }
        let root = Spot::Image(self.tree.root());
        let first = u32::try_from(from.saturating_sub(2)).unwrap_or(u32::MAX);
        for id in first..self.views.count() {
            let entry = self.entry(ViewId(id), root)?;
            let name = id.to_string();
            if !list.add(
                name.as_bytes(),
                u64::from(id) + 3,
                (entry.attr.ino, Kind::Dir),
                || entry,
            ) {
                break;
            }
        }
        Ok(())
    }

    /// Lists `.` and `..`, what the view adds, and what the image has. The place of an entry of the image counts from
    /// behind the others.
    fn list_view(&self, id: ViewId, dir: Spot, from: u64, list: &mut List<'_>) -> Outcome {
        let view = self.view(id)?;
        let (kind, attr) = self.attr(id, dir)?;
        if kind != Kind::Dir {
            return Err(Refusal(libc::ENOTDIR));
        }
        let parent = match dir {
            Spot::Made(index) => match view.made(index).map(|made| made.parent) {
                Some(Spot::Image(at)) => self.tree.stat(at)?.number,
                Some(Spot::Made(index)) => made_number(id, index),
                None => attr.ino,
            },
            // The kernel knows better, and shows it for `..` of a mount; nobody else reads it.
            Spot::Image(_) => attr.ino,
        };
        if !list.dots(from, attr.ino, parent) {
            return Ok(());
        }
        let added = view.added(dir);
        let first = usize::try_from(from.saturating_sub(2)).unwrap_or(usize::MAX);
        for (index, (name, made)) in added.iter().enumerate().skip(first) {
            let spot = Spot::Made(*made);
            let kind = view.made(*made).map_or(Kind::File, |made| made.kind);
            let inode = (made_number(id, *made), kind);
            let entry = || self.entry(id, spot).unwrap_or_default();
            if !list.add(name, index as u64 + 3, inode, entry) {
                return Ok(());
            }
        }
        let Spot::Image(at) = dir else { return Ok(()) };
        let base = added.len() as u64 + 2;
        let add = &mut |entry: Entry<'_>| {
            let inode = (entry.number, entry.kind);
            // Without an entry the name is listed all the same; a lookup will tell what is wrong.
            let whole = || self.entry(id, Spot::Image(entry.at)).unwrap_or_default();
            list.add(entry.name, base.saturating_add(entry.next), inode, whole)
        };
        let listed = self.tree.list(at, from.saturating_sub(base), add);
        // What was read before the damage is listed; the error comes when the reader goes on.
        match listed {
            Err(error) if list.reply.bytes.is_empty() => Err(error.into()),
            _ => Ok(()),
        }
    }
}
