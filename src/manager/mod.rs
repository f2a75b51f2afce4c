//! The image manager: SAVE, CHK, LIST and DEL for portals and people, over the record and the queue.

pub mod shape;
